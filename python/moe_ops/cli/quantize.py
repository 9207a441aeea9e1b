"""`moe-ops quantize`: writes a checkpoint with quantized experts, and measures the cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import moe_ops.hf
from moe_ops import quant
from moe_ops.cli import checkpoints, hub
from moe_ops.quant.bank import find_banks, idle_patterns

REPORT_NAME = "moe_ops_quantization.json"


@dataclass(frozen=True)
class QuantizeOptions:
    source: Path
    target: Path
    format: str = "int4"
    group_size: int | None = None
    dense: str | None = None
    text: Path | None = None
    scales: bool = False
    tokens: int = 4096
    context: int = 512
    skip: tuple[str, ...] = ()
    overwrite: bool = False
    push_to: str | None = None


def run(options: QuantizeOptions, console: Console) -> dict[str, Any]:
    """Quantizes `source` into `target`; returns the report that it also writes there.

    Raises:
        ValueError: invalid options or checkpoint.
        OSError: the target could not be written; its contents are unchanged.
    """
    config = config_of("quantize: --format", options.format, options.group_size)
    dense = None
    if options.dense is not None:
        dense = config_of("quantize: --dense", options.dense)
    hub.check_id("quantize", options.push_to)
    source, context = hub.local_folder("quantize", options.source), options.context
    _check(options, source)
    calibrating = judging = None
    if options.text is not None:
        calibrating, judging = checkpoints.read_text(
            "quantize", source, options.text, options.tokens
        )
    started = time.perf_counter()
    if judging is None and not options.skip:
        return _while_loading(options, source, config, dense, started, console)
    model = checkpoints.load_model("quantize", source)
    _check_skip(model, options.skip)
    baseline = calibration = None
    if judging is not None:
        console.print(f"Measuring the float model on {judging.numel()} tokens.")
        baseline = quant.collect_calibration(
            model,
            checkpoints.batches(judging, context),
            tokens=judging,
            context=context,
            forward=checkpoints.forward,
        )
    if options.scales and calibrating is not None:
        batches = checkpoints.batches(calibrating, context)
        calibration = quant.collect_calibration(model, batches, outputs=False)
    size = checkpoints.size_of(model)

    def progress(name: str, done: int, total: int) -> None:
        console.print(f"{done + 1}/{total} {name}", markup=False)

    moe_ops.quantize(
        model,
        config,
        dense=dense,
        calibration=calibration,
        skip=options.skip,
        progress=progress,
    )
    result = _result(options, config, dense, size, model, started)
    if baseline is not None:
        report = quant.compare_quality(model, baseline)
        console.print(report.table(), markup=False, soft_wrap=True)
        result["quality"] = report.to_dict()
    return _write(options, source, model, result, console)


def _while_loading(
    options: QuantizeOptions,
    source: Path,
    config: quant.WeightConfig,
    dense: quant.WeightConfig | None,
    started: float,
    console: Console,
) -> dict[str, Any]:
    """Quantizes each layer as soon as it has been read: memory never holds the float model."""
    how = moe_ops.hf.MoeOpsConfig(config, dense=dense)
    model = checkpoints.load_model("quantize", source, quantization_config=how)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    result = _result(options, config, dense, size, model, started)
    return _write(options, source, model, result, console)


def _result(
    options: QuantizeOptions,
    config: quant.WeightConfig,
    dense: quant.WeightConfig | None,
    size: int,
    model: Any,
    started: float,
) -> dict[str, Any]:
    return {
        "source": options.source.name,
        "format": config.label,
        "dense": None if dense is None else dense.label,
        "scales": options.scales,
        "model_bytes_before": size,
        "model_bytes_after": checkpoints.size_of(model),
        "seconds": time.perf_counter() - started,
    }


def _write(
    options: QuantizeOptions, source: Path, model: Any, result: dict[str, Any], console: Console
) -> dict[str, Any]:
    checkpoints.write_model("quantize", model, source, options.target, REPORT_NAME, result)
    before, after = result["model_bytes_before"], result["model_bytes_after"]
    console.print(
        f"The whole model: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB. Load it with\n"
        f"  import moe_ops.hf\n"
        f"  from transformers import AutoModelForCausalLM\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(options.target)!r})",
        markup=False,
        soft_wrap=True,
    )
    if options.push_to is not None:
        result["repository"] = hub.upload("quantize", options.target, options.push_to)
        console.print(f"Uploaded to {result['repository']}.", markup=False, soft_wrap=True)
    return result


def config_of(owner: str, format: str, group_size: int | None = None) -> quant.WeightConfig:
    """Returns the config of a format's name; errors begin with `owner`, the command and option."""
    configs = {"int8": quant.Int8WeightConfig, "fp8": quant.Fp8WeightConfig}
    if format not in ("int4", *configs):
        raise ValueError(f"{owner} must be int4, int8 or fp8, got {format!r}.")
    if format == "int4":
        return quant.Int4WeightConfig(group_size or 64)
    if group_size is not None:
        raise ValueError(f"quantize: --group-size must come with int4, got it with {format}.")
    return configs[format]()


def _check(options: QuantizeOptions, source: Path) -> None:
    checkpoints.check_folders("quantize", source, options.target, overwrite=options.overwrite)
    if options.scales and options.text is None:
        raise ValueError("quantize: --scales must come with --text, got it alone.")


def _check_skip(model: torch.nn.Module, skip: tuple[str, ...]) -> None:
    idle = idle_patterns(model, skip)
    if idle:
        banks = [found.name for found in find_banks(model, unsupported="skip")]
        raise ValueError(
            f"quantize: --skip must match the name of a bank, got {idle[0]!r}; banks are "
            f"{', '.join(banks[:4])}{', ...' if len(banks) > 4 else ''}."
        )

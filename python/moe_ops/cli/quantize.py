"""`moe-ops quantize`: a checkpoint in, a checkpoint with quantised experts out, and the cost."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

import moe_ops.hf
from moe_ops import _files, quant
from moe_ops.quant.bank import find_banks, idle_patterns

REPORT_NAME = "moe_ops_quantization.json"
# What save_pretrained writes itself, or what a quantised checkpoint must not hold.
_NOT_COPIED = ("config.json", "generation_config.json", REPORT_NAME)
# The most that is read of a text, far more than calibration and perplexity need.
_MAX_CHARACTERS = 2**28
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py")


@dataclass(frozen=True)
class QuantizeOptions:
    source: Path
    target: Path
    bits: int = 4
    group_size: int | None = None
    text: Path | None = None
    scales: bool = False
    tokens: int = 4096
    context: int = 512
    skip: tuple[str, ...] = ()
    overwrite: bool = False


def run(options: QuantizeOptions, console: Console) -> dict[str, Any]:
    """Quantises `source` into `target`; returns what it also writes there as a report.

    Raises:
        ValueError: options or a checkpoint that cannot work, with a sentence.
        OSError: the target could not be written; what was in it is still there.
    """
    from transformers import AutoModelForCausalLM

    _check(options)
    calibrating, judging = (None, None) if options.text is None else _read_text(options)
    started = time.perf_counter()
    with _from(options.source):
        model = AutoModelForCausalLM.from_pretrained(options.source, dtype="auto")
    model.eval()
    _check_skip(model, options.skip)
    baseline = calibration = None
    if judging is not None:
        console.print(f"Measuring the float model on {judging.numel()} tokens.")
        baseline = quant.record_baseline(
            model,
            _batches(judging, options.context),
            tokens=judging,
            context=options.context,
            forward=_forward,
        )
    if options.scales and calibrating is not None:
        batches = _batches(calibrating, options.context)
        calibration = quant.record_baseline(model, batches, outputs=False)
    size = _size(model)

    def progress(name: str, done: int, total: int) -> None:
        console.print(f"{done + 1}/{total} {name}", markup=False)

    moe_ops.quantize_experts(
        model,
        f"int{options.bits}",
        group_size=options.group_size,
        calibration=calibration,
        skip=options.skip,
        progress=progress,
    )
    result: dict[str, Any] = {
        "source": options.source.name,
        "format": f"int{options.bits}",
        "group_size": model.config.quantization_config.group_size,
        "scales": options.scales,
        "model_bytes_before": size,
        "model_bytes_after": _size(model),
        "seconds": time.perf_counter() - started,
    }
    if baseline is not None:
        report = quant.quality_report(model, baseline)
        console.print(report.table(), markup=False, soft_wrap=True)
        result["quality"] = report.to_dict()
    _write(model, options, result)
    before, after = result["model_bytes_before"], result["model_bytes_after"]
    console.print(
        f"The whole model: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB. Load it with\n"
        f"  import moe_ops.hf\n"
        f"  from transformers import AutoModelForCausalLM\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(options.target)!r})",
        markup=False,
        soft_wrap=True,
    )
    return result


def _check(options: QuantizeOptions) -> None:
    if options.bits not in (4, 8):
        raise ValueError(f"quantize: --bits must be 4 or 8, got {options.bits}.")
    if not (options.source / "config.json").is_file():
        raise ValueError(
            f"quantize: SOURCE must be a folder with a config.json, got {options.source}."
        )
    target = options.target
    if target.exists() and target.samefile(options.source):
        raise ValueError(f"quantize: TARGET must be another folder than SOURCE, got {target}.")
    if target.exists() and not target.is_dir():
        raise ValueError(f"quantize: TARGET must be a folder, got the file {target}.")
    if target.exists() and not options.overwrite and any(target.iterdir()):
        raise ValueError(
            f"quantize: TARGET must be empty or new without --overwrite, got {target}."
        )
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


def _read_text(options: QuantizeOptions) -> tuple[Tensor, Tensor]:
    """The first tokens, for calibration, and the last ones, to judge by; none is in both."""
    from transformers import AutoTokenizer

    assert options.text is not None
    if not options.text.is_file():
        raise ValueError(f"quantize: --text must be a file, got {options.text}.")
    with open(options.text, encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_CHARACTERS)
    try:
        _files.check_folder(options.source, SAFE_WEIGHTS_INDEX_NAME)
        tokenizer = AutoTokenizer.from_pretrained(options.source)
    except Exception as error:
        raise ValueError(
            f"quantize: SOURCE must hold a tokenizer for --text, got none: {error}"
        ) from None
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    each = min(options.tokens, ids.numel() // 2)
    if each < 2:
        raise ValueError(f"quantize: --text must hold at least 4 tokens, got {ids.numel()}.")
    return ids[:each], ids[-each:]


def _batches(tokens: Tensor, context: int) -> list[dict[str, Any]]:
    pieces = tokens.split(context)
    return [{"input_ids": piece[None], "use_cache": False} for piece in pieces if piece.numel()]


def _forward(model: Any, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=False)


def _size(model: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@contextlib.contextmanager
def _from(source: Path) -> Iterator[None]:
    """Whatever transformers says about a checkpoint that it cannot read, in one sentence."""
    try:
        _files.check_folder(source, SAFE_WEIGHTS_INDEX_NAME)
        yield
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"quantize: SOURCE must be a checkpoint that transformers can load, got {source}: "
            f"{first}"
        ) from error


def _write(model: Any, options: QuantizeOptions, report: dict[str, Any]) -> None:
    """All files of the target at once, or none: those of an earlier checkpoint stay until then."""
    target = _files.make_folder(options.target)
    with _files.Replacement(target, last="config.json") as files:
        staging = files.staging()
        try:
            model.save_pretrained(staging)
        except SafetensorError as error:
            raise ValueError(f"quantize: TARGET must be writable, got {target}: {error}") from error
        _copy_rest(options.source, staging)
        for path in staging.iterdir():
            files.adopt(path.name, path)
        files.add(REPORT_NAME, (json.dumps(report, indent=2) + "\n").encode())
        files.remove("model*.safetensors", "model*.safetensors.index.json")


def _copy_rest(source: Path, target: Path) -> None:
    """Tokenizer, chat template and the like, which save_pretrained does not write."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json")
        if path.is_file() and wanted and path.name not in _NOT_COPIED:
            shutil.copyfile(path, target / path.name)

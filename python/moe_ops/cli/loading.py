"""Models that `moe-ops chat` and `moe-ops serve` generate with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import moe_ops.hf
from moe_ops import memory
from moe_ops.cli import checkpoints, hub
from moe_ops.cli.quantize import config_of

_TYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class LoadOptions:
    """Options of both commands."""

    model: Path
    quantize: str | None = None
    dtype: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Checked:
    """Holds what `check` found.

    folder: the folder of the model.
    tokenizer: its tokenizer.
    format: the format that --quantize names, or None.
    arguments: those of `from_pretrained`.
    """

    folder: Path
    tokenizer: Any
    format: Any
    arguments: dict[str, Any]


def check(command: str, options: LoadOptions, *, needs_template: bool = False) -> Checked:
    """Checks options and a model, without reading its weights. Downloads an id of the hub.

    Raises:
        ValueError: invalid options, or a folder without a causal language model or a tokenizer.
    """
    if options.dtype not in _TYPES:
        raise ValueError(
            f"{command}: --dtype must be {', '.join(_TYPES[:-1])} or {_TYPES[-1]}, got "
            f"{options.dtype!r}."
        )
    config = None
    if options.quantize is not None:
        config = config_of(f"{command}: --quantize", options.quantize)
    folder = hub.local_folder(command, options.model, "MODEL")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{command}: MODEL must be a folder with a config.json or an id of the hub, got "
            f"{folder}."
        )
    tokenizer = _tokenizer(command, folder)
    if needs_template and tokenizer.chat_template is None:
        raise ValueError(
            f"{command}: MODEL must have a chat template, as instruction-tuned models do, got none "
            f"in {folder}."
        )
    arguments: dict[str, Any] = {"dtype": options.dtype}
    if config is not None:
        held = _format_of(command, folder)
        if held is None:
            arguments["quantization_config"] = moe_ops.hf.MoeOpsConfig(config)
        elif held != config.label:
            raise ValueError(
                f"{command}: --quantize must be left out for a checkpoint that is quantized, got "
                f"{options.quantize} for one of {held}."
            )
    return Checked(folder, tokenizer, config, arguments)


def load(
    command: str, options: LoadOptions, console: Console, *, needs_template: bool = False
) -> tuple[Any, Any]:
    """Returns the optimized model and its tokenizer. transformers draws the bar of loading, during
    which experts are quantized too.

    Raises:
        ValueError: those of `check`, or a model that cannot be read.
    """
    found = check(command, options, needs_template=needs_template)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = checkpoints.load_model(command, found.folder, "MODEL", **found.arguments)
    report = moe_ops.hf.optimize(model, quantization=found.format)
    memory.release_file_pages()
    console.print(
        f"{options.model}: {checkpoints.size_of(model) / 2**20:.0f} MiB, {len(report)} modules run "
        f"on moe_ops, {torch.get_num_threads()} threads.",
        markup=False,
        soft_wrap=True,
    )
    return model, found.tokenizer


def _tokenizer(command: str, folder: Path) -> Any:
    with checkpoints.reading(command, folder, "MODEL"):
        config = AutoConfig.from_pretrained(folder)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{command}: MODEL must be a causal language model, got {config.model_type} in "
            f"{folder}."
        )
    tokenizer, reason = None, "none"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = str(error).splitlines()[0]
    # Without files, some classes of transformers make a tokenizer without words.
    if tokenizer is None or not any(
        (folder / name).is_file() for name in tokenizer.vocab_files_names.values()
    ):
        raise ValueError(
            f"{command}: MODEL must hold a tokenizer (tokenizer.json), got in {folder}: {reason}"
        )
    return tokenizer


def _format_of(command: str, folder: Path) -> str | None:
    """Returns the format or the method of a quantized checkpoint; None for a float one."""
    with checkpoints.reading(command, folder, "MODEL"):
        held = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if held is None:
        return None
    values = held if isinstance(held, dict) else held.to_dict()
    return str(values.get("format") or values.get("quant_method"))

"""`moe-ops export`: writes a model in the format of another program."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import moe_ops.hf
from moe_ops.cli import checkpoints, hub
from moe_ops.quant.importance import collect_importance


@dataclass(frozen=True)
class ExportOptions:
    source: Path
    target: Path
    format: str
    dense: str | None = None
    text: Path | None = None
    tokens: int = 16384
    context: int = 512
    overwrite: bool = False


def run(options: ExportOptions, console: Console) -> dict[str, Any]:
    """Writes `source` to `target`; returns what it did.

    Raises:
        ValueError: invalid options or checkpoint.
        OSError: the target could not be written; its contents are unchanged.
    """
    source, target = hub.local_folder("export", options.source), options.target
    if options.format.startswith("gguf"):
        _check_file(source, target, options.overwrite)
    else:
        checkpoints.check_folders("export", source, target, overwrite=options.overwrite)
    started = time.perf_counter()
    model: Any = source
    importance = None
    if options.text is not None:
        seen, _ = checkpoints.read_text("export", source, options.text, options.tokens)
        model = checkpoints.load_model("export", source, experts_implementation="moe_ops")
        console.print(f"Looking at {seen.numel()} tokens.")
        importance = collect_importance(model, checkpoints.batches(seen, options.context))
    report = moe_ops.hf.export(
        model, target, format=options.format, dense=options.dense, calibration=importance
    )
    result: dict[str, Any] = {
        "source": options.source.name,
        "format": options.format,
        "dense": options.dense,
        "bytes": _size_of(target),
        "seconds": time.perf_counter() - started,
        "tensors": report,
    }
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(report.values()).items()))
    console.print(
        f"{target}: {result['bytes'] / 2**20:.1f} MiB in {result['seconds']:.1f} s; tensors by "
        f"type: {kinds}.",
        markup=False,
        soft_wrap=True,
    )
    return result


def _check_file(source: Path, target: Path, overwrite: bool) -> None:
    if not (source / "config.json").is_file():
        raise ValueError(f"export: SOURCE must be a folder with a config.json, got {source}.")
    if target.is_dir():
        raise ValueError(f"export: TARGET must be a file for GGUF, got the folder {target}.")
    if target.exists() and not overwrite:
        raise ValueError(f"export: TARGET must be new without --overwrite, got {target}.")


def _size_of(target: Path) -> int:
    files = [target] if target.is_file() else list(target.glob("*.safetensors"))
    return sum(path.stat().st_size for path in files)

"""Commands that read a checkpoint of transformers, change the model, and write another one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from moe_ops import _files, quant

# What save_pretrained writes itself.
_NOT_COPIED = ("config.json", "generation_config.json")
# The most that is read of a text, far more than calibration and perplexity need.
_MAX_CHARACTERS = 2**28
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py")


def check_folders(
    command: str, source: Path, target: Path, *, overwrite: bool, target_name: str = "TARGET"
) -> None:
    """Raises ValueError where there is nothing to read, or something in the way. `target_name` is
    what the command line calls the target."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{command}: SOURCE must be a folder with a config.json, got {source}.")
    if target.exists() and target.samefile(source):
        raise ValueError(
            f"{command}: {target_name} must be another folder than SOURCE, got {target}."
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"{command}: {target_name} must be a folder, got the file {target}.")
    if target.exists() and not overwrite and any(target.iterdir()):
        raise ValueError(
            f"{command}: {target_name} must be empty or new without --overwrite, got {target}."
        )


def read_text(command: str, source: Path, text: Path, tokens: int) -> tuple[Tensor, Tensor]:
    """The first `tokens` tokens, to calibrate, and the last ones, to judge by; none is in both."""
    return read_tokens(command, source, text, tokens)[:2]


def read_tokens(command: str, source: Path, text: Path, tokens: int) -> tuple[Tensor, Tensor, Any]:
    """As `read_text`, and the tokenizer."""
    from transformers import AutoTokenizer

    if not text.is_file():
        raise ValueError(f"{command}: --text must be a file, got {text}.")
    with open(text, encoding="utf-8", errors="replace") as file:
        content = file.read(_MAX_CHARACTERS)
    try:
        _files.check_folder(source, SAFE_WEIGHTS_INDEX_NAME)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ValueError(
            f"{command}: SOURCE must hold a tokenizer for --text, got none: {error}"
        ) from None
    ids = torch.tensor(tokenizer(content)["input_ids"], dtype=torch.int64)
    each = min(tokens, ids.numel() // 2)
    if each < 2:
        raise ValueError(f"{command}: --text must hold at least 4 tokens, got {ids.numel()}.")
    return ids[:each], ids[-each:], tokenizer


def batches(tokens: Tensor, context: int) -> list[dict[str, Any]]:
    """Sequences of `context` tokens (the last may be shorter) as arguments of a model."""
    pieces = tokens.split(context)
    return [{"input_ids": piece[None], "use_cache": False} for piece in pieces if piece.numel()]


def forward(model: Any, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=False)


def perplexity(model: Any, tokens: Tensor, context: int) -> float:
    """Of a text in sequences of `context` tokens."""
    return quant.perplexity(model, tokens, context=context, forward=forward)


def size_of(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def load_model(command: str, source: Path) -> Any:
    """The causal language model in a folder, in eval mode."""
    from transformers import AutoModelForCausalLM

    with _reading(command, source):
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    return model.eval()


@contextlib.contextmanager
def _reading(command: str, source: Path) -> Iterator[None]:
    """Whatever transformers says about a checkpoint that it cannot read, in one sentence."""
    try:
        _files.check_folder(source, SAFE_WEIGHTS_INDEX_NAME)
        yield
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{command}: SOURCE must be a checkpoint that transformers can load, got {source}: "
            f"{first}"
        ) from error


def write_model(
    command: str,
    model: Any,
    source: Path,
    target: Path,
    report_name: str,
    report: Any,
    *,
    target_name: str = "TARGET",
) -> None:
    """All files of the target at once, or none: those of an earlier checkpoint stay until then.

    Tokenizer, chat template and the like, which save_pretrained does not write, are copied.

    Args:
        report_name, report: a further file, of JSON.
        target_name: what the command line calls the target.
    """
    folder = _files.make_folder(target)
    with _files.Replacement(folder, last="config.json") as files:
        staging = files.staging()
        try:
            model.save_pretrained(staging)
        except SafetensorError as error:
            raise ValueError(
                f"{command}: {target_name} must be writable, got {folder}: {error}"
            ) from error
        _copy_rest(source, staging, {*_NOT_COPIED, report_name})
        for path in staging.iterdir():
            files.adopt(path.name, path)
        files.add(report_name, (json.dumps(report, indent=2) + "\n").encode())
        files.remove("model*.safetensors", "model*.safetensors.index.json")


def _copy_rest(source: Path, target: Path, excepted: set[str]) -> None:
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json")
        if path.is_file() and wanted and path.name not in excepted:
            shutil.copyfile(path, target / path.name)

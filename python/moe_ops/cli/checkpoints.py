"""Commands that read a checkpoint of transformers, change the model, and write a new checkpoint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from moe_ops import _files, quant
from moe_ops.hf.checkpoints.files import copy_rest

# save_pretrained writes these.
_NOT_COPIED = ("config.json", "generation_config.json")
# Maximum number of characters read from a text, far more than calibration and perplexity need.
_MAX_CHARACTERS = 2**28


def check_folders(
    command: str, source: Path, target: Path, *, overwrite: bool, target_name: str = "TARGET"
) -> None:
    """Raises ValueError if the source is missing or the target would be overwritten. `target_name`
    is the name of the target on the command line."""
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
    """Returns the first `tokens` tokens, for calibration, and the last ones, for evaluation,
    without overlap."""
    return read_tokens(command, source, text, tokens)[:2]


def read_tokens(command: str, source: Path, text: Path, tokens: int) -> tuple[Tensor, Tensor, Any]:
    """Returns the result of `read_text`, and the tokenizer."""
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
    """Splits tokens into sequences of `context` tokens (the last may be shorter), as arguments of a
    model."""
    pieces = tokens.split(context)
    return [{"input_ids": piece[None], "use_cache": False} for piece in pieces if piece.numel()]


def forward(model: Any, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=False)


def perplexity(model: Any, tokens: Tensor, context: int) -> float:
    """Computes the perplexity of a text in sequences of `context` tokens."""
    return quant.perplexity(model, tokens, context=context, forward=forward)


def size_of(model: torch.nn.Module) -> int:
    """Returns the bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def load_model(command: str, source: Path, source_name: str = "SOURCE", **options: Any) -> Any:
    """Loads the causal language model in a folder, in eval mode. `options` are those of
    `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    with reading(command, source, source_name):
        model = AutoModelForCausalLM.from_pretrained(source, **{"dtype": "auto", **options})
    return model.eval()


@contextlib.contextmanager
def reading(command: str, source: Path, source_name: str = "SOURCE") -> Iterator[None]:
    """Converts errors of transformers about an unreadable checkpoint to one sentence."""
    try:
        _files.check_folder(source, SAFE_WEIGHTS_INDEX_NAME)
        yield
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{command}: {source_name} must be a checkpoint that transformers can load, got "
            f"{source}: {first}"
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
    """Replaces all files of the target together, or none: files of an earlier checkpoint are kept
    until then.

    Copies the tokenizer, chat template and other files that save_pretrained does not write.

    Args:
        command: name of the command, for errors.
        model: the model to save.
        source: folder of the original checkpoint.
        target: folder to write.
        report_name, report: name and JSON contents of an additional file.
        target_name: name of the target on the command line.
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
        copy_rest(source, staging, {*_NOT_COPIED, report_name})
        for path in staging.iterdir():
            files.adopt(path.name, path)
        files.add(report_name, (json.dumps(report, indent=2) + "\n").encode())
        files.remove("model*.safetensors", "model*.safetensors.index.json")

"""Bytes of experts and of other weights in the safetensors files of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_ops import _reading

_EXPERTS = re.compile(r"(^|\.)(experts|block_sparse_moe\.(input|output)_linear)\.")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte)\.")


@dataclass(frozen=True)
class Stored:
    """Bytes of the weights of a checkpoint.

    Attributes:
        experts: routed experts, with their scales.
        embedding: table of the tokens; 0 if no name is known to be one.
        others: all other weights.
    """

    experts: int
    embedding: int
    others: int


def find_stored(model: str | Path) -> Stored | None:
    """Returns the sizes of the weights in a folder; None if it is no folder or has no safetensors
    files.

    Raises:
        ValueError: a damaged file, or no weights of experts.
    """
    folder = Path(model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    experts = embedding = others = 0
    for file in files:
        for name, size in _sizes(file):
            if _EXPERTS.search(name):
                experts += size
            elif _EMBEDDING.search(name):
                embedding += size
            else:
                others += size
    if not experts:
        raise ValueError(
            f"plan: the files in {folder} must have weights of experts, got none whose name has "
            "'experts'."
        )
    return Stored(experts, embedding, others)


def _sizes(file: Path) -> Iterator[tuple[str, int]]:
    """Yields names and bytes of the tensors of a file."""
    _reading.check_safetensors(file, "plan")
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, last - first

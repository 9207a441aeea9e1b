"""A model whose experts stay in the files of its checkpoint.

Letters: E experts of a bank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from moe_ops import _files
from moe_ops.layers import Experts
from moe_ops.offload import FileStore, offload_experts
from moe_ops.offload.store import Piece, Stored, read_header

from .checkpoint import Entry, Reader


def leave_experts(
    model: Any,
    reader: Reader,
    entries: Sequence[Entry],
    dtype: torch.dtype,
    device: torch.device | str,
    options: Mapping[str, Any],
) -> list[Entry]:
    """Offloads the experts of a model on the meta device to the checkpoint that has them.

    Args:
        dtype, device: of the slots.
        options: arguments of `offload_experts`.

    Returns:
        The entries of what is still to be loaded. The cache is `model.expert_cache`.

    Raises:
        ValueError: no experts, or fp8 ones.
    """
    options = dict(options)
    keep_cached = options.pop("keep_cached", True)
    skip = options.get("skip", ())
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    by_name = {entry.name: entry for entry in entries}
    headers: dict[str, dict[str, Piece]] = {}

    def piece(key: str) -> Piece:
        stored = reader.stored[key]
        if stored.file not in headers:
            headers[stored.file] = read_header(Path(_files.inside(reader.folder, stored.file)))
        found = headers[stored.file].get(key)
        if found is None or not found.dtype.is_floating_point:
            raise ValueError(
                f"from_pretrained: {key} must be one of F64, F32, BF16, F16 to stay in its file, "
                f"got {stored.dtype}."
            )
        return found

    banks: list[list[dict[str, list[Piece]]]] = []
    tensors: dict[str, Stored] = {}
    gone: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Experts) or any(fnmatchcase(name, p) for p in patterns):
            continue
        experts: list[dict[str, list[Piece]]] = [{} for _ in range(module.num_experts)]
        for parameter_name, parameter in module.named_parameters():
            entry = by_name[f"{name}.{parameter_name}"]
            gone.add(entry.name)
            tensors[parameter_name] = Stored(tuple(parameter.shape[1:]), dtype)
            parts_of = [piece(key) for key in entry.keys]
            if entry.layout == "experts":
                parts_of = [
                    _marked(p, reader, k) for p, k in zip(parts_of, entry.keys, strict=True)
                ]
            pieces = _pieces(entry, parts_of, module.num_experts)
            for expert, parts in zip(experts, pieces, strict=True):
                expert[parameter_name] = parts
        banks.append(experts)
    if not banks:
        raise ValueError(
            f"from_pretrained: offload needs a model with experts, got {type(model).__name__} "
            "without any."
        )
    store = FileStore(banks, tensors, keep_cached=keep_cached)
    model.expert_cache = offload_experts(model, store=store, device=device, **options)
    return [entry for entry in entries if entry.name not in gone]


def _marked(piece: Piece, reader: Reader, key: str) -> Piece:
    """Returns a piece with the checksum of the tensor that it is the whole of, if there is one.

    Raises:
        ValueError: the checksum is of a tensor of another type or shape.
    """
    said = reader.marks.get(key)
    if said is None:
        return piece
    stored = reader.stored[key]
    crc32, _, kind = said.partition(" ")
    if kind != f"{stored.dtype} {list(stored.shape)}" or not re.fullmatch("[0-9a-f]{8}", crc32):
        raise ValueError(
            f"from_pretrained: {key} in {reader.folder / stored.file} must match its checksum "
            f"{said[:80]}, got {stored.dtype} {list(stored.shape)}."
        )
    return piece._replace(crc32=int(crc32, 16))


def _pieces(entry: Entry, pieces: Sequence[Piece], num_experts: int) -> list[list[Piece]]:
    """Of each expert, from those of the keys."""
    if entry.layout == "experts":
        parts = entry.parts
        return [list(pieces[e * parts : (e + 1) * parts]) for e in range(num_experts)]
    (whole,) = pieces
    size = whole.num_bytes // num_experts
    return [
        [
            whole._replace(
                offset=whole.offset + e * size,
                shape=whole.shape[1:],
                transposed=entry.layout == "transposed",
            )
        ]
        for e in range(num_experts)
    ]

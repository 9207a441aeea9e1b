"""Helpers of the operations on experts: argument checks, and rows of parameters.

A row is the part of a parameter [E, ...] that belongs to one expert. Letters: E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_ops._sharded import check_whole


def whole_rows(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the detached tensors; raises ValueError if this process has only a part of one."""
    for key, tensor in tensors.items():
        check_whole(name, key, tensor, "select, append, split and merge before sharding the model")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def as_ids(name: str, ids: Sequence[int] | Tensor | None, num_experts: int) -> list[int]:
    """Returns ids as a list of Python ints in [0, num_experts); None is all of them."""
    if ids is None:
        return list(range(num_experts))
    index = [int(e) for e in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    if not index or min(index) < 0 or max(index) >= num_experts:
        raise ValueError(f"{name}: ids must be in [0, {num_experts}), got {index}.")
    return index


def check_split(name: str, factor: int, mode: str) -> None:
    if factor < 1:
        raise ValueError(f"{name}: factor must be at least 1, got {factor}.")
    if mode not in ("slice", "copy"):
        raise ValueError(f"{name}: mode must be 'slice' or 'copy', got {mode!r}.")


def split_rows(index: list[int], factor: int, num_experts: int) -> list[int]:
    """Returns the parent of each expert after a split of `index`, which must not repeat."""
    chosen = set(index)
    if len(chosen) != len(index):
        raise ValueError(f"split: ids must not repeat, got {index}.")
    return [e for e in range(num_experts) for _ in range(factor if e in chosen else 1)]


def as_groups(
    name: str, groups: Sequence[Sequence[int]], num_experts: int, mode: str
) -> list[list[int]]:
    if mode not in ("mean", "concat"):
        raise ValueError(f"{name}: mode must be 'mean' or 'concat', got {mode!r}.")
    members = [as_ids(name, group, num_experts) for group in groups]
    flat = [e for group in members for e in group]
    if not members or len(set(flat)) != len(flat):
        raise ValueError(f"{name}: groups must hold each expert at most once, got {members}.")
    if mode == "concat" and len({len(group) for group in members}) != 1:
        raise ValueError(f"{name}: groups must have one size with mode='concat', got {members}.")
    return members


def merge_matrix(
    name: str,
    members: list[list[int]],
    weights: Tensor | Sequence[float] | None,
    num_experts: int,
) -> Tensor:
    """Returns [groups, E] fp64 with the weights of each group's mean; rows sum to 1."""
    w = torch.as_tensor(
        [1.0] * num_experts if weights is None else weights, dtype=torch.float64, device="cpu"
    ).detach()
    if w.shape != (num_experts,) or bool((w < 0).any()):
        raise ValueError(f"{name}: weights must be [{num_experts}] numbers >= 0, got {w.tolist()}.")
    matrix = torch.zeros(len(members), num_experts, dtype=torch.float64, device="cpu")
    for row, group in enumerate(members):
        total = w[group].sum()
        if total <= 0:
            raise ValueError(f"{name}: weights must not all be 0 in a group, got {group}.")
        matrix[row, group] = w[group] / total
    return matrix


def mix_rows(matrix: Tensor, p: Tensor) -> Tensor:
    """Computes matrix [G, E] times p [E, ...] over experts, in at least fp32, and returns the dtype
    of p."""
    acc = torch.float64 if p.dtype == torch.float64 else torch.float32
    mixed = matrix.to(p.device, acc) @ p.reshape(p.shape[0], -1).to(acc)
    return mixed.view(-1, *p.shape[1:]).to(p.dtype)


def repeated_rows(tensors: Mapping[str, Tensor], num: int, init: str) -> dict[str, Tensor] | None:
    """Returns `num` new rows: "copy" repeats the old rows in order, "mean" uses their mean. Returns
    None for other values of `init`."""
    if init == "copy":
        return {n: take_rows(t, [i % t.shape[0] for i in range(num)]) for n, t in tensors.items()}
    if init == "mean":
        return {n: t.mean(0, keepdim=True).expand(num, *t.shape[1:]) for n, t in tensors.items()}
    return None


def take_rows(p: Tensor, rows: list[int]) -> Tensor:
    return p.index_select(0, torch.tensor(rows, device=p.device))

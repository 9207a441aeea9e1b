"""Operations on `Experts`, documented by its methods.

`Experts` imports these functions, so the class cannot be imported here. Letters: H hidden size, I
intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .rows import (
    as_groups,
    as_ids,
    check_split,
    merge_matrix,
    mix_rows,
    repeated_rows,
    split_rows,
    take_rows,
    whole_rows,
)


def select(bank: Any, ids: Sequence[int] | Tensor) -> Any:
    """Implements `Experts.select`."""
    index = as_ids("Experts.select", ids, bank.num_experts)
    return _rebuild(bank, {name: take_rows(p, index) for name, p in _row_tensors(bank).items()})


def append(bank: Any, other: int | Any, init: str) -> Any:
    """Implements `Experts.append`."""
    old = _row_tensors(bank)
    if not isinstance(other, int):
        if other.config() != bank.config() or _row_tensors(other).keys() != old.keys():
            raise ValueError(
                f"Experts.append: other must fit {bank} in all but the number of experts, got "
                f"{other}."
            )
        new = _row_tensors(other)
    else:
        new = _fresh_rows(bank, other, init)
    return _rebuild(bank, {name: torch.cat([p, new[name].to(p)]) for name, p in old.items()})


def split(
    bank: Any,
    ids: Sequence[int] | Tensor | None,
    factor: int,
    mode: str,
    noise: float,
) -> Any:
    """Implements `Experts.split`."""
    index = as_ids("Experts.split", ids, bank.num_experts)
    check_split("Experts.split", factor, mode)
    if mode == "slice" and (bank.intermediate_size % factor or noise):
        raise ValueError(
            "Experts.split: factor must divide intermediate_size = "
            f"{bank.intermediate_size} (and noise be 0) with mode='slice', got factor "
            f"{factor} and noise {noise}."
        )
    rows = split_rows(index, factor, bank.num_experts)
    tensors = {name: take_rows(p, rows) for name, p in _row_tensors(bank).items()}
    chosen = set(index)
    is_part = torch.tensor([e in chosen for e in rows], device=bank.w_down.device)
    if mode == "copy":
        if noise:
            for name in ("w_gate_up", "w_down"):
                w = tensors[name]
                scale = 1 + noise * torch.randn_like(w)
                tensors[name] = torch.where(is_part[:, None, None], w * scale, w)
        return _rebuild(bank, tensors)

    # Slice index of each row: 0, 1, ... in turn for split experts; -1 for unsplit experts, which
    # keep all neurons.
    width = bank.intermediate_size // factor
    part, parts = 0, []
    for e in rows:
        parts.append(part % factor if e in chosen else -1)
        part = part + 1 if e in chosen else part
    neuron = torch.arange(bank.intermediate_size, device=is_part.device)
    part_of_row = torch.tensor(parts, device=is_part.device)[:, None]
    keep = (part_of_row < 0) | (neuron // width == part_of_row)  # [rows, I]
    for name in ("w_gate_up", "b_gate_up", "w_down"):
        if name not in tensors:
            continue
        by_neuron = _neurons_first(bank, name, tensors[name])
        if len(chosen) == bank.num_experts:
            taken = by_neuron[keep].view(len(rows), width, *by_neuron.shape[2:])
        else:
            mask = keep.view(*keep.shape, *[1] * (by_neuron.dim() - 2))
            taken = by_neuron.masked_fill(~mask, 0.0)
        tensors[name] = _neurons_back(bank, name, taken)
    if "b_down" in tensors:
        b = tensors["b_down"]
        tensors["b_down"] = torch.where(is_part[:, None], b / factor, b)
    return _rebuild(bank, tensors)


def merge(
    bank: Any,
    groups: Sequence[Sequence[int]],
    weights: Tensor | Sequence[float] | None,
    mode: str,
    neuron_order: Tensor | None,
) -> Any:
    """Implements `Experts.merge`."""
    members = as_groups("Experts.merge", groups, bank.num_experts, mode)
    tensors = _row_tensors(bank)
    if neuron_order is not None:
        tensors = _reorder(bank, tensors, neuron_order)
    if mode == "mean":
        matrix = merge_matrix("Experts.merge", members, weights, bank.num_experts)
        return _rebuild(bank, {name: mix_rows(matrix, p) for name, p in tensors.items()})
    if weights is not None:
        raise ValueError("Experts.merge: weights must be None with mode='concat', got weights.")
    rows = [e for group in members for e in group]
    size = len(members[0])
    merged = {}
    for name, p in tensors.items():
        taken = take_rows(p, rows)
        if name == "b_down":
            merged[name] = taken.view(len(members), size, -1).sum(1)
            continue
        by_neuron = _neurons_first(bank, name, taken)
        side_by_side = by_neuron.reshape(len(members), -1, *by_neuron.shape[2:])
        merged[name] = _neurons_back(bank, name, side_by_side)
    return _rebuild(bank, merged)


def _reorder(bank: Any, tensors: dict[str, Tensor], neuron_order: Tensor) -> dict[str, Tensor]:
    shape = (bank.num_experts, bank.intermediate_size)
    every = torch.arange(bank.intermediate_size, device="cpu").expand(shape)
    if neuron_order.shape != shape or not torch.equal(
        neuron_order.long().sort(-1).values.cpu(), every
    ):
        raise ValueError(
            f"Experts.merge: neuron_order must be {list(shape)}, each row a permutation, got "
            f"shape {list(neuron_order.shape)}."
        )
    order = neuron_order.long().to(bank.w_down.device)
    result = dict(tensors)
    for name in ("w_gate_up", "b_gate_up", "w_down"):
        if name in result:
            p = _neurons_first(bank, name, result[name])
            index = order.view(*order.shape, *[1] * (p.dim() - 2)).expand(p.shape)
            result[name] = _neurons_back(bank, name, p.gather(1, index))
    return result


def _neurons_first(bank: Any, name: str, p: Tensor) -> Tensor:
    """Returns a view or copy [E, I, ...] of a parameter, grouped by hidden neuron."""
    if name == "w_down":
        return p.transpose(1, 2)  # [E, I, H]
    if not bank.gated:
        return p
    rows, rest = p.shape[0], p.shape[2:]
    if bank.interleaved:
        return p.reshape(rows, -1, 2, *rest)  # [E, I, 2, ...]
    return p.reshape(rows, 2, -1, *rest).transpose(1, 2)


def _neurons_back(bank: Any, name: str, p: Tensor) -> Tensor:
    """Inverts `_neurons_first`, for any number of experts and neurons."""
    if name == "w_down":
        return p.transpose(1, 2)
    if not bank.gated:
        return p
    if not bank.interleaved:
        p = p.transpose(1, 2)
    return p.reshape(p.shape[0], -1, *p.shape[3:])


def _row_tensors(bank: Any) -> dict[str, Tensor]:
    tensors = dict(bank.named_parameters(recurse=False))
    if bank.sharding is not None:
        tensors = {name: bank.sharding.gather(p) for name, p in tensors.items()}
    return whole_rows("Experts", tensors)


def _fresh_rows(bank: Any, num: int, init: str) -> dict[str, Tensor]:
    if num < 1:
        raise ValueError(f"Experts.append: the number of experts must be >= 1, got {num}.")
    repeated = repeated_rows(_row_tensors(bank), num, init)
    if repeated is not None:
        return repeated
    if init not in ("random", "zero_output"):
        raise ValueError(
            f"Experts.append: init must be 'random', 'zero_output', 'copy' or 'mean', got {init!r}."
        )
    fresh = bank.blank(num, device=bank.w_down.device, dtype=bank.w_down.dtype)
    new = _row_tensors(fresh)
    if init == "zero_output":
        new["w_down"].zero_()
    return new


def _rebuild(bank: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns experts like these with other weights; sizes are taken from the tensors."""
    num_experts, _, intermediate_size = tensors["w_down"].shape
    # On the meta device, initialization draws no random numbers.
    result = bank.blank(num_experts, intermediate_size=intermediate_size, device="meta")
    for name, old in bank.named_parameters(recurse=False):
        new = tensors[name].to(old.device, old.dtype)
        new = new.clone(memory_format=torch.contiguous_format)
        setattr(result, name, nn.Parameter(new, requires_grad=old.requires_grad))
    if bank.sharding is not None:
        bank.sharding.shard(result)
    return result.train(bank.training)

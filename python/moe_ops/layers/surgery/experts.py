"""What can be done to a trained bank of experts: select, append, split, merge.

Letters: H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_ops._sharded import check_whole

if TYPE_CHECKING:
    from .experts import Experts


class BankOperations(nn.Module):
    """The operations of `Experts`, which alone inherits them."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    output_size: int
    gated: bool
    interleaved: bool
    w_gate_up: nn.Parameter
    w_down: nn.Parameter
    b_gate_up: nn.Parameter | None
    b_down: nn.Parameter | None

    def _new(self, num_experts: int, **config: Any) -> Experts:
        """A fresh bank with biases where this one has them."""
        raise NotImplementedError

    def select(self, ids: Sequence[int] | Tensor) -> Experts:
        """A new bank of the experts `ids`, in that order (repeats allowed).

        Raises:
            ValueError: no id, or one outside [0, E).
        """
        index = as_ids("Experts.select", ids, self.num_experts)
        return self._rebuild({name: take_rows(p, index) for name, p in self._row_tensors().items()})

    def append(self, other: int | Experts, *, init: str = "random") -> Experts:
        """A new bank with experts added at the end.

        Args:
            other: the number of experts to add (at least 1), or a bank whose experts to add; its
                sizes and activation must be the same.
            init: of a number of experts: "random" (as in a fresh bank), "zero_output" (random, with
                w_down and b_down 0: they contribute nothing until trained), "copy" (experts 0, 1,
                ... again), "mean" (the mean of all experts).

        Raises:
            ValueError: an unknown `init`, a number below 1, or banks that do not fit together.
        """
        old = self._row_tensors()
        if not isinstance(other, int):
            if other._config() != self._config() or other._row_tensors().keys() != old.keys():
                raise ValueError(
                    f"Experts.append: other must fit {self} in all but the number of experts, got "
                    f"{other}."
                )
            new = other._row_tensors()
        else:
            new = self._fresh_rows(other, init)
        return self._rebuild({name: torch.cat([p, new[name].to(p)]) for name, p in old.items()})

    def split(
        self,
        ids: Sequence[int] | Tensor | None = None,
        factor: int = 2,
        *,
        mode: str = "slice",
        noise: float = 0.0,
    ) -> Experts:
        """A new bank in which each expert of `ids` becomes `factor` experts, in its place.

        mode="slice": each takes a run of I / factor hidden neurons and 1 / factor of b_down, so
        that the slices of an expert add up to it. When all experts are split, the new bank's
        intermediate size is I / factor (fine-grained experts); when only some are, it stays I and
        the slices are filled up with zeros. mode="copy": each is the expert itself; with `noise`,
        every weight of the copies is multiplied by 1 + noise * (a normal number).

        Args:
            ids: experts to split, without repeats; None is all.
            factor: number of parts, at least 1.
            mode: "slice" or "copy".
            noise: of mode="copy".

        Raises:
            ValueError: bad ids, factor or mode, noise with slices, or a factor that does not
                divide I.

        Source: Dai et al. 2024 (fine-grained experts, arXiv 2401.06066); Zhao et al. 2024
        (FactorLLM, arXiv 2408.11855).
        """
        index = as_ids("Experts.split", ids, self.num_experts)
        check_split("Experts.split", factor, mode)
        if mode == "slice" and (self.intermediate_size % factor or noise):
            raise ValueError(
                "Experts.split: factor must divide intermediate_size = "
                f"{self.intermediate_size} (and noise be 0) with mode='slice', got factor "
                f"{factor} and noise {noise}."
            )
        rows = split_rows(index, factor, self.num_experts)
        tensors = {name: take_rows(p, rows) for name, p in self._row_tensors().items()}
        chosen = set(index)
        is_part = torch.tensor([e in chosen for e in rows], device=self.w_down.device)
        if mode == "copy":
            if noise:
                for name in ("w_gate_up", "w_down"):
                    w = tensors[name]
                    scale = 1 + noise * torch.randn_like(w)
                    tensors[name] = torch.where(is_part[:, None, None], w * scale, w)
            return self._rebuild(tensors)

        # Which slice each row is: 0, 1, ... in turn for the parts; unsplit experts keep all.
        width = self.intermediate_size // factor
        part, parts = 0, []
        for e in rows:
            parts.append(part % factor if e in chosen else -1)
            part = part + 1 if e in chosen else part
        neuron = torch.arange(self.intermediate_size, device=is_part.device)
        part_of_row = torch.tensor(parts, device=is_part.device)[:, None]
        keep = (part_of_row < 0) | (neuron // width == part_of_row)  # [rows, I]
        for name in ("w_gate_up", "b_gate_up", "w_down"):
            if name not in tensors:
                continue
            by_neuron = self._neurons_first(name, tensors[name])
            if len(chosen) == self.num_experts:
                taken = by_neuron[keep].view(len(rows), width, *by_neuron.shape[2:])
            else:
                mask = keep.view(*keep.shape, *[1] * (by_neuron.dim() - 2))
                taken = by_neuron.masked_fill(~mask, 0.0)
            tensors[name] = self._neurons_back(name, taken)
        if "b_down" in tensors:
            b = tensors["b_down"]
            tensors["b_down"] = torch.where(is_part[:, None], b / factor, b)
        return self._rebuild(tensors)

    def merge(
        self,
        groups: Sequence[Sequence[int]],
        weights: Tensor | Sequence[float] | None = None,
        *,
        mode: str = "mean",
        neuron_order: Tensor | None = None,
    ) -> Experts:
        """A new bank with one expert for each group of old ones; experts in no group are dropped.

        mode="mean": the weighted mean of their parameters. Hidden neurons have no natural order, so
        experts that were trained apart should be aligned first: `neuron_order` reorders the neurons
        of each before the mean (which by itself changes no expert's function).
        mode="concat": their neurons side by side, b_down added up: an expert that computes the sum
        of its members, with intermediate size I * (group size). It undoes `split` by slices.

        Args:
            groups: lists of ids, each id at most once over all lists, none empty.
            weights: [E] weights of the mean, at least 0, made to sum to 1 in each group; None is
                equal weights. Only with mode="mean".
            mode: "mean" or "concat" (groups of one size).
            neuron_order: [E, I] integers, each row a permutation of 0..I-1: neuron j of expert e
                is taken from its neuron neuron_order[e, j].

        Raises:
            ValueError: bad groups, weights, mode or neuron_order.

        Source of the alignment before merging: Sarkar et al. 2024 (UNCURL, arXiv 2409.01483).
        """
        members = as_groups("Experts.merge", groups, self.num_experts, mode)
        tensors = self._row_tensors()
        if neuron_order is not None:
            tensors = self._reorder(tensors, neuron_order)
        if mode == "mean":
            matrix = merge_matrix("Experts.merge", members, weights, self.num_experts)
            return self._rebuild({name: mix_rows(matrix, p) for name, p in tensors.items()})
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
            by_neuron = self._neurons_first(name, taken)
            side_by_side = by_neuron.reshape(len(members), -1, *by_neuron.shape[2:])
            merged[name] = self._neurons_back(name, side_by_side)
        return self._rebuild(merged)

    def _reorder(self, tensors: dict[str, Tensor], neuron_order: Tensor) -> dict[str, Tensor]:
        shape = (self.num_experts, self.intermediate_size)
        every = torch.arange(self.intermediate_size, device="cpu").expand(shape)
        if neuron_order.shape != shape or not torch.equal(
            neuron_order.long().sort(-1).values.cpu(), every
        ):
            raise ValueError(
                f"Experts.merge: neuron_order must be {list(shape)}, each row a permutation, got "
                f"shape {list(neuron_order.shape)}."
            )
        order = neuron_order.long().to(self.w_down.device)
        result = dict(tensors)
        for name in ("w_gate_up", "b_gate_up", "w_down"):
            if name in result:
                p = self._neurons_first(name, result[name])
                index = order.view(*order.shape, *[1] * (p.dim() - 2)).expand(p.shape)
                result[name] = self._neurons_back(name, p.gather(1, index))
        return result

    def _neurons_first(self, name: str, p: Tensor) -> Tensor:
        """A view or copy [E, I, ...] of a parameter, everything of one hidden neuron together."""
        if name == "w_down":
            return p.transpose(1, 2)  # [E, I, H]
        if not self.gated:
            return p
        rows, rest = p.shape[0], p.shape[2:]
        if self.interleaved:
            return p.reshape(rows, -1, 2, *rest)  # [E, I, 2, ...]
        return p.reshape(rows, 2, -1, *rest).transpose(1, 2)

    def _neurons_back(self, name: str, p: Tensor) -> Tensor:
        """The inverse of `_neurons_first`, for any number of experts and neurons."""
        if name == "w_down":
            return p.transpose(1, 2)
        if not self.gated:
            return p
        if not self.interleaved:
            p = p.transpose(1, 2)
        return p.reshape(p.shape[0], -1, *p.shape[3:])

    def _row_tensors(self) -> dict[str, Tensor]:
        return whole_rows("Experts", dict(self.named_parameters(recurse=False)))

    def _config(self) -> dict[str, Any]:
        names = ("hidden_size", "intermediate_size", "output_size", "activation", "interleaved")
        return {name: getattr(self, name) for name in (*names, "alpha", "limit")}

    def _fresh_rows(self, num: int, init: str) -> dict[str, Tensor]:
        if num < 1:
            raise ValueError(f"Experts.append: the number of experts must be >= 1, got {num}.")
        old = self._row_tensors()
        if init == "copy":
            rows = [i % self.num_experts for i in range(num)]
            return {name: take_rows(p, rows) for name, p in old.items()}
        if init == "mean":
            return {
                name: p.mean(0, keepdim=True).expand(num, *p.shape[1:]) for name, p in old.items()
            }
        if init not in ("random", "zero_output"):
            raise ValueError(
                "Experts.append: init must be 'random', 'zero_output', 'copy' or 'mean', got "
                f"{init!r}."
            )
        fresh = self._new(
            num,
            device=self.w_down.device,
            dtype=self.w_down.dtype,
            **self._config(),
        )
        new = fresh._row_tensors()
        if init == "zero_output":
            new["w_down"].zero_()
        return new

    def _rebuild(self, tensors: dict[str, Tensor]) -> Experts:
        """A bank like this one with other experts; sizes are taken from the tensors."""
        num_experts, _, intermediate_size = tensors["w_down"].shape
        config = {**self._config(), "intermediate_size": intermediate_size}
        # On the meta device initialisation draws no random numbers.
        result = self._new(num_experts, device="meta", **config)
        for name, old in self.named_parameters(recurse=False):
            new = tensors[name].to(old).clone(memory_format=torch.contiguous_format)
            setattr(result, name, nn.Parameter(new, requires_grad=old.requires_grad))
        return result.train(self.training)


# ------------------------------------------------- arguments that all bank operations share


def whole_rows(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without their history; raises ValueError where this process has a part of one."""
    for key, tensor in tensors.items():
        check_whole(name, key, tensor, "select, append, split and merge before sharding the model")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def as_ids(name: str, ids: Sequence[int] | Tensor | None, num_experts: int) -> list[int]:
    """Ids as a list of Python ints in [0, num_experts); None is all of them."""
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
    """The parent of each expert after a split of `index`, which must not repeat."""
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
    """[groups, E] fp64 with the weights of the mean of each group; rows sum to 1."""
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
    """matrix [G, E] times p [E, ...] over experts, in fp32 at least, in the dtype of p."""
    acc = torch.float64 if p.dtype == torch.float64 else torch.float32
    mixed = matrix.to(p.device, acc) @ p.reshape(p.shape[0], -1).to(acc)
    return mixed.view(-1, *p.shape[1:]).to(p.dtype)


def take_rows(p: Tensor, rows: list[int]) -> Tensor:
    return p.index_select(0, torch.tensor(rows, device=p.device))

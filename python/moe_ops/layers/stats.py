"""Expert loads: token counts per expert and statistics of their balance.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .ranks import sum_counts


def count_tokens_per_expert(
    topk_ids: Tensor, num_experts: int, *, token_mask: Tensor | None = None
) -> Tensor:
    """Counts slots per expert without a device sync.

    Args:
        topk_ids: [..., K] int32 or int64; ids outside [0, num_experts) are not counted.
        num_experts: E >= 1.
        token_mask: bool, one element per token, True if the token counts; None counts all.

    Returns:
        tokens_per_expert: [E] int64 on the device of `topk_ids`. Zeros without tokens.

    Raises:
        ValueError: `token_mask` does not have one element per token.
    """
    ids = topk_ids.reshape(-1).long()
    valid = (ids >= 0) & (ids < num_experts)
    if token_mask is not None:
        num_tokens = topk_ids.shape[:-1].numel()
        if token_mask.numel() != num_tokens:
            raise ValueError(
                f"count_tokens_per_expert: token_mask must have {num_tokens} elements, one a "
                f"token, got shape {list(token_mask.shape)}."
            )
        valid = valid & token_mask.bool().reshape(-1, 1).expand(-1, topk_ids.shape[-1]).reshape(-1)
    # bincount would need a device sync for its output size; a spare bin counts ignored slots.
    bins = torch.where(valid, ids, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add(0, bins, torch.ones_like(bins))[:num_experts]


def moved_counts(counts: Tensor, device: torch.device) -> Tensor:
    """Moves counts that are not buffers to the device of their router."""
    if counts.device != device and "meta" in (counts.device.type, device.type):
        return torch.zeros_like(counts, device=device)
    return counts.to(device)


class ExpertLoadStats:
    """Running counts of tokens per expert for each layer.

    `update` adds on the device of the ids without a device sync; only reading a value (`as_dict`,
    `max_violation`, ...) syncs. Nothing is recorded for autograd.

    Example:
        stats = ExpertLoadStats()
        for name, ids in routings:                 # ids: [T, K] of each MoE layer
            stats.update(ids, num_experts, layer=name)
        stats.all_reduce()                         # over ranks, if torch.distributed is used
        print(stats.as_dict())

    Measures, for counts c with mean m over the E experts of a layer:

    - max_violation (MaxVio): max(c) / m - 1, 0 when balanced (Wang et al. 2024, arXiv 2408.15664)
    - load_cv: standard deviation of c (over E, not E - 1) / m
    - load_entropy: entropy of c / sum(c) in nats, log(E) when balanced
    - dead_experts: number of experts with c = 0

    All are 0 for a layer without tokens, except dead_experts, which is then E.
    """

    def __init__(self) -> None:
        self._counts: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def update(
        self,
        topk_ids: Tensor,
        num_experts: int,
        *,
        layer: Hashable = 0,
        token_mask: Tensor | None = None,
    ) -> None:
        """Adds the slots of one call to the counts.

        Args:
            topk_ids: [..., K] int32 or int64; ids outside [0, E) are ignored.
            num_experts: E; must be constant for a layer.
            layer: hashable key, such as the layer's index or name.
            token_mask: bool, one element per token, True if the token counts.

        Raises:
            ValueError: another number of experts than in previous updates of the layer.
        """
        self._add(layer, count_tokens_per_expert(topk_ids, num_experts, token_mask=token_mask))

    def _add(self, layer: Hashable, counts: Tensor) -> None:
        seen = self._counts.get(layer)
        if seen is None:
            self._counts[layer] = counts.clone()
            return
        if seen.shape != counts.shape:
            raise ValueError(
                f"ExpertLoadStats: layer {layer!r} must have {seen.shape[0]} experts as before, "
                f"got {counts.shape[0]}."
            )
        seen.add_(counts.to(seen.device))

    def merge(self, other: ExpertLoadStats) -> ExpertLoadStats:
        """Adds the counts of `other`, which is unchanged, and returns self."""
        for layer, counts in other._counts.items():
            self._add(layer, counts)
        return self

    def all_reduce(self, group: Any = None) -> ExpertLoadStats:
        """Sums the counts over the ranks of `group` (None: all), in one all-reduce for all layers,
        and returns self. Does nothing without torch.distributed.

        All ranks must have counted the same layers in the same order. Call it once before reading:
        a second call would sum the sums.
        """
        sum_counts(self._counts.values(), group)
        return self

    def reset(self) -> None:
        """Removes the counts of all layers."""
        self._counts.clear()

    @property
    def layers(self) -> list[Hashable]:
        """Returns the counted layers, in the order of their first update."""
        return list(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def tokens_per_expert(self, layer: Hashable = 0) -> Tensor:
        """Returns the counts [E] int64 of a layer: the tensor that `update` adds to, not a copy."""
        return self._counts[layer]

    def max_violation(self, layer: Hashable = 0) -> float:
        """Returns MaxVio of a layer: load of the busiest expert over the mean load, minus 1."""
        return self._measure(layer)["max_violation"]

    def max_rank_violation(self, num_ranks: int, layer: Hashable = 0) -> float:
        """Returns MaxVio of the ranks of expert parallelism, each with E / n consecutive experts.
        It measures how long ranks wait for the busiest one; unbalanced experts on balanced ranks
        cost no time.

        Raises:
            ValueError: `num_ranks` does not divide E.
        """
        counts = self._counts[layer]
        if num_ranks < 1 or counts.shape[0] % num_ranks:
            raise ValueError(
                f"ExpertLoadStats: num_ranks must divide the {counts.shape[0]} experts of layer "
                f"{layer!r}, got {num_ranks}."
            )
        load = counts.view(num_ranks, -1).sum(1).double()
        total = float(load.sum())
        return float(load.max()) * num_ranks / total - 1 if total else 0.0

    def load_cv(self, layer: Hashable = 0) -> float:
        """Returns the coefficient of variation of a layer's load."""
        return self._measure(layer)["load_cv"]

    def load_entropy(self, layer: Hashable = 0) -> float:
        """Returns the entropy of a layer's load, in nats; log(E) if balanced."""
        return self._measure(layer)["load_entropy"]

    def dead_experts(self, layer: Hashable = 0) -> list[int]:
        """Returns the ids of a layer's experts without tokens."""
        return self._measure(layer)["dead_experts"]

    def _measure(self, layer: Hashable) -> dict[str, Any]:
        counts = self._counts[layer].tolist()  # the only device sync
        load = torch.tensor(counts, dtype=torch.float64, device="cpu")
        total, num_experts = load.sum().item(), len(counts)
        dead = [e for e, c in enumerate(counts) if c == 0]
        if total == 0:
            violation = cv = entropy = 0.0
        else:
            share = load / total
            violation = share.max().item() * num_experts - 1
            cv = share.std(correction=0).item() * num_experts
            entropy = -torch.special.xlogy(share, share).sum().item()
        return {
            "tokens_per_expert": counts,
            "num_slots": sum(counts),
            "max_violation": violation,
            "load_cv": cv,
            "load_entropy": entropy,
            "dead_experts": dead,
        }

    def as_dict(self) -> dict[Hashable, dict[str, Any]]:
        """Returns, per layer, tokens_per_expert (list of int), num_slots, max_violation, load_cv,
        load_entropy (floats) and dead_experts (list of ids), as plain Python values,
        JSON-serializable if the layer keys are."""
        return {layer: self._measure(layer) for layer in self._counts}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k!r}: E={c.shape[0]}" for k, c in self._counts.items())
        return f"ExpertLoadStats({shapes})"

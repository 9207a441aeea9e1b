"""Expert capacity: `CapacityMixin` limits the slots of an expert per batch.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..stats import count_tokens_per_expert
from .base import Router
from .options import check
from .topk import TopKRouter

DROPS = ("position", "weight")


def drop_over_capacity(
    topk_weights: Tensor, topk_ids: Tensor, num_experts: int, capacity: int, *, by: str = "position"
) -> tuple[Tensor, Tensor]:
    """Empties slots beyond the capacity of their expert.

    Args:
        topk_weights: [T, K] float. topk_ids: [T, K] int32 or int64; ids outside [0, E) are empty
            slots and use no capacity.
        num_experts, capacity: E, and the maximum number of slots per expert, at least 0.
        by: priority of slots. "position": all first experts (k = 0) before all second ones, tokens
            in their order within. "weight": larger weights first; ties in the order of "position".

    Returns:
        topk_weights and topk_ids [T, K], with weight 0 and id -1 in emptied slots. Other weights
        are unchanged and are not renormalized.

    Raises:
        ValueError: an unknown `by`, a negative capacity, or shapes that differ.

    Source: Lepikhin et al. 2020 (GShard, arXiv 2006.16668) and Fedus et al. 2021 (Switch
    Transformers, arXiv 2101.03961) by position; Riquelme et al. 2021 (V-MoE, arXiv 2106.05974) by
    weight.
    """
    if by not in DROPS:
        raise ValueError(f"drop_over_capacity: by must be one of {', '.join(DROPS)}, got {by!r}.")
    if capacity < 0:
        raise ValueError(f"drop_over_capacity: capacity must be at least 0, got {capacity}.")
    if topk_ids.dim() != 2 or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            "drop_over_capacity: topk_ids and topk_weights must be [T, K], got shapes "
            f"{list(topk_ids.shape)} and {list(topk_weights.shape)}."
        )
    # Slots in order of priority, then sorted by expert (stable).
    ids = topk_ids.t().reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    if by == "weight":
        order = topk_weights.detach().t().reshape(-1).argsort(descending=True, stable=True)
    else:
        order = torch.arange(ids.numel(), device=ids.device)
    order = order[ids[order].argsort(stable=True)]
    counts = count_tokens_per_expert(ids[:, None], num_experts + 1)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(ids.numel(), device=ids.device) - starts[ids[order]]
    over = torch.empty_like(rank, dtype=torch.bool)
    over[order] = (rank >= capacity) & (ids[order] < num_experts)
    over = over.view(topk_ids.shape[1], topk_ids.shape[0]).t()
    return topk_weights.masked_fill(over, 0.0), topk_ids.masked_fill(over, -1)


class CapacityMixin(Router):
    """Mixin that gives any router a capacity: `class Mine(CapacityMixin, SomeRouter)`.

    An expert takes at most ceil(capacity_factor * T * K / E) slots, where T is the number of tokens
    in the call. Slots beyond that become -1 with weight 0; a token without slots gets 0 from the
    routed experts. A token's output therefore depends on its batch, also in inference.

    `update_expert_bias` reads the loads after dropping. With `renormalize`, weights are normalized
    before slots are dropped, while `weights_at` with given ids normalizes over the remaining slots.

    Args:
        capacity_factor: greater than 0; None drops nothing.
        eval_capacity_factor: capacity factor in `eval()`; None drops nothing.
        drop_by: "position" or "weight", see `drop_over_capacity`.
        sizes, options: arguments of the router.
    """

    # The priority of an expert's slices would depend on rounding.
    splits_into_slices = False

    def __init__(
        self,
        *sizes: int,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = None,
        drop_by: str = "position",
        **options: Any,
    ) -> None:
        super().__init__(*sizes, **options)
        for factor in (capacity_factor, eval_capacity_factor):
            check(
                factor is None or factor > 0, f"capacity_factor must be > 0 or None, got {factor}"
            )
        check(drop_by in DROPS, f"drop_by must be one of {', '.join(DROPS)}, got {drop_by!r}")
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.drop_by = drop_by

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = super().choose_experts(router_logits, expert_mask)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return weights, ids
        capacity = math.ceil(factor * ids.shape[0] * self.top_k / self.num_experts)
        return drop_over_capacity(weights, ids, self.num_experts, capacity, by=self.drop_by)


class CapacityRouter(CapacityMixin, TopKRouter, kind="capacity"):
    """`TopKRouter` with a capacity. GShard uses `renormalize=True` with two experts per token,
    Switch Transformers one expert per token."""

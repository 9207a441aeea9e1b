"""Balance without a loss: a bias that only the choice of experts sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ranks import sum_counts
from .router import Router


@torch.no_grad()
def update_expert_bias(
    target: nn.Module | Tensor,
    tokens_per_expert: Tensor | None = None,
    *,
    rate: float = 1e-3,
    group: Any = None,
) -> None:
    """Balance without a loss: expert_bias[e] += rate * sign(mean load - load of e), in place.

    Call it once an optimiser step, after `optimizer.step()`. A module is searched for `Router`s
    with an `expert_bias`; each has counted the slots of its training forwards since the last call
    (so over gradient accumulation, and without counting recomputation twice), and starts again from
    zero. Counts are summed over the ranks of `group` first when torch.distributed is initialised,
    in one all-reduce for all routers, so that every rank makes the same step. A layer that saw no
    slot keeps its bias.

    Args:
        target: a module, or the bias itself, [E] float, then with `tokens_per_expert`.
        tokens_per_expert: [E] counts since the last update; only with a bias.
        rate: size of the step. 1e-3 for long runs (DeepSeek-V3); short runs need about 1e-2.
        group: process group to sum over; None is the default group. With pipeline parallelism it
            is the ranks of the stage, since the others have other routers.

    Raises:
        ValueError: a module that holds no router with expert_bias, a tensor without counts, a
            module with counts, or counts of another shape than the bias.

    Source: Wang et al. 2024 (auxiliary-loss-free load balancing, arXiv 2408.15664).
    """
    if isinstance(target, Tensor):
        if tokens_per_expert is None or tokens_per_expert.shape != target.shape:
            got = None if tokens_per_expert is None else list(tokens_per_expert.shape)
            raise ValueError(
                f"update_expert_bias: tokens_per_expert must have the bias's shape "
                f"{list(target.shape)}, got {got}."
            )
        counts = tokens_per_expert.clone()
        sum_counts([counts], group)
        _step(target, counts, rate)
        return
    if tokens_per_expert is not None:
        raise ValueError(
            "update_expert_bias: tokens_per_expert goes with a bias tensor (routers count "
            f"themselves), got it with a {type(target).__name__}."
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for router in target.modules():
        if isinstance(router, Router) and router.expert_bias is not None:
            assert router.tokens_per_expert is not None
            pairs.append((router.expert_bias, router.tokens_per_expert))
    if not pairs:
        raise ValueError(
            "update_expert_bias: target must hold a Router with expert_bias=True, got a "
            f"{type(target).__name__} without one."
        )
    sum_counts([counts for _, counts in pairs], group)
    for expert_bias, counts in pairs:
        _step(expert_bias, counts, rate)
        counts.zero_()


def _step(bias: Tensor, counts: Tensor, rate: float) -> None:
    # sum - E * load has the sign of mean - load and is exact in integers.
    bias.add_((counts.sum() - counts.numel() * counts).sign().to(bias), alpha=rate)

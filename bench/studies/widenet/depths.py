"""Measures of how the choice of experts changes with depth.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_ops.layers import count_tokens_per_expert
from moe_ops.zoo.lm.losses import Routed


@torch.no_grad()
def depth_loads(routing: Sequence[Routed]) -> Tensor:
    """[depths, E] fp64: the share of each depth's choices that an expert has, of one forward."""
    loads = torch.stack(
        [count_tokens_per_expert(r.routing.topk_ids, r.router.num_experts) for r in routing]
    ).double()
    return loads / loads.sum(1, keepdim=True)


@torch.no_grad()
def across_depths(routing: Sequence[Routed]) -> dict[str, float]:
    """Measures how the choice of experts changes with depth.

    Args:
        routing: of one forward, in the order of depth, two or more with the same tokens.

    Returns:
        "kept": share of tokens whose best expert is that of the depth before, mean over depths.
        "divergence": Jensen-Shannon divergence of the depths' loads, in nats: 0 where all depths
        use the experts equally often.
    """
    if len(routing) < 2:
        raise ValueError(
            f"across_depths: routing must be of two depths or more, got {len(routing)}."
        )
    best = torch.stack([r.routing.router_logits.argmax(-1) for r in routing])
    loads = depth_loads(routing)

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1)

    return {
        "kept": float((best[1:] == best[:-1]).double().mean()),
        "divergence": max(float(entropy(loads.mean(0)) - entropy(loads).mean()), 0.0),
    }

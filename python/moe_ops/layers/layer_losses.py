"""Auxiliary losses summed over layers with equal routing options.

Each equals the sum of the corresponding function of `losses` over the layers, in a few operations
on all layers together.

Letters: L layers, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .losses import _mean, _mean_and_counts, _probabilities, _share


def total_load_balancing_loss(
    router_logits: Sequence[Tensor],
    topk_ids: Sequence[Tensor],
    *,
    score_func: str = "softmax",
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Computes the sum of `load_balancing_loss` over layers.

    Args:
        router_logits: one [T, E] tensor per layer.
        topk_ids: one [T, K] tensor per layer; ids outside [0, E) do not count.
        score_func: score function of the router; scores other than softmax are divided by their
            sum.
        token_mask: bool, one element per token, True if the token counts.
        group: ranks whose tokens are balanced together, with one all-reduce for all layers.
    """
    logits, mask = _stack(router_logits, token_mask)
    num_layers, _, num_experts = logits.shape
    ids = torch.stack(list(topk_ids)).long()
    valid = (ids >= 0) & (ids < num_experts)
    if mask is not None:
        valid = valid & mask[:, None]
    # One bin per layer and expert, and a spare one for slots that do not count.
    first = torch.arange(0, num_layers * num_experts, num_experts, device=ids.device)
    bins = torch.where(valid, ids + first[:, None, None], num_layers * num_experts).flatten()
    counts = torch.zeros(num_layers * num_experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, bins, torch.ones_like(bins))[:-1]
    probs = _probabilities(logits, score_func)
    counts = counts.view(num_layers, num_experts)
    mean_probs, counts = _mean_and_counts(probs, mask, counts, dim=1, group=group)
    f = _share(counts, logits.dtype)
    return num_experts * (f * mean_probs).sum()


def total_router_z_loss(
    router_logits: Sequence[Tensor],
    topk_ids: Sequence[Tensor] = (),
    *,
    score_func: str = "softmax",
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Computes the sum of `router_z_loss` over layers, from one router_logits [T, E] per layer;
    topk_ids and score_func are ignored."""
    logits, mask = _stack(router_logits, token_mask)
    return _mean(logits.logsumexp(-1).square(), mask, dim=1, group=group).sum()


def _stack(
    router_logits: Sequence[Tensor], token_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns logits as [L, T, E] in fp32 or fp64, with masked tokens zeroed, and the mask as [T]
    bool."""
    logits = torch.stack(list(router_logits))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if token_mask is None:
        return logits, None
    mask = token_mask.reshape(-1).to(torch.bool)
    return logits.masked_fill(~mask[:, None], 0.0), mask


# Keys are names of `AUX_LOSSES`; losses missing here are summed layer by layer.
TOTAL_LOSSES: dict[str, Callable[..., Tensor]] = {
    "load_balancing": total_load_balancing_loss,
    "router_z": total_router_z_loss,
}

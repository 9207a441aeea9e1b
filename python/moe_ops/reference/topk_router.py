from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype, order_descending
from ._scores import router_scores


def topk_router(
    router_logits: Tensor,
    top_k: int,
    *,
    score_func: str = "softmax",
    topk_first: bool = False,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    num_topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """Computes routing weights [T, K] and expert ids [T, K] int32 from router logits [T, E]."""
    logits = router_logits.to(acc_dtype(router_logits.dtype))
    scores = router_scores(router_logits, score_func)

    # All scores are monotone, so without a bias or a sum of scores the logits themselves rank the
    # experts, without ties from rounding of close scores.
    needs_scores = expert_bias is not None or (num_groups > 1 and group_score == "top2_sum")
    key = logits if topk_first or not needs_scores else scores
    if expert_bias is not None:
        key = key + expert_bias.to(key.dtype)

    dropped = _dropped_by_groups(key, num_groups, num_topk_groups, group_score)
    ids = order_descending(key, dropped)[:, :top_k]

    if topk_first and score_func == "softmax":
        weights = logits.gather(1, ids).softmax(-1)
    else:
        weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids.to(torch.int32)


def _dropped_by_groups(
    key: Tensor, num_groups: int, num_topk_groups: int, group_score: str
) -> Tensor | None:
    """Returns a mask [T, E] of the experts whose group is not among the best `num_topk_groups`."""
    if num_groups == 1:
        return None
    num_tokens, num_experts = key.shape
    group_size = num_experts // num_groups
    grouped = key.detach().view(num_tokens, num_groups, group_size)
    descending = grouped.gather(-1, order_descending(grouped))
    best = 1 if group_score == "max" else min(2, group_size)
    group_key = descending[..., :best].sum(-1)
    kept = order_descending(group_key)[:, :num_topk_groups]
    dropped = torch.ones_like(group_key, dtype=torch.bool).scatter(1, kept, False)
    return dropped.repeat_interleave(group_size, dim=1)

from __future__ import annotations

import torch
from torch import Tensor

from ._common import order_descending
from ._scores import router_scores


def expert_choice_router(
    router_logits: Tensor,
    capacity: int,
    *,
    score_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Selects each expert's `capacity` best tokens (Zhou et al. 2022): weights and ids [T, E].

    The experts of a token are in ascending order, followed by -1 with weight 0.
    """
    num_experts = router_logits.shape[1]
    scores = router_scores(router_logits, score_func)
    tokens = order_descending(scores, dim=0)[:capacity]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(0, tokens, True)

    # A stable sort of "not selected" moves the selected experts to the front in ascending order.
    ids = (~chosen).to(torch.int8).argsort(dim=1, stable=True)
    used = torch.arange(num_experts, device=scores.device) < chosen.sum(1, keepdim=True)
    weights = scores.gather(1, ids).masked_fill(~used, 0)
    return weights * routed_scaling_factor, ids.masked_fill(~used, -1).to(torch.int32)

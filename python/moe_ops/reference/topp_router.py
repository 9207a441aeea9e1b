from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype, order_descending


def topp_router(
    router_logits: Tensor,
    top_p: float,
    max_k: int | None = None,
    *,
    min_k: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Selects the fewest experts per token whose probabilities reach `top_p`: weights and ids [T,
    max_k].

    Unused slots have id -1 and weight 0.
    """
    num_experts = router_logits.shape[1]
    max_k = num_experts if max_k is None else max_k
    logits = router_logits.to(acc_dtype(router_logits.dtype))
    ids = order_descending(logits)
    probs = logits.softmax(-1).gather(1, ids)

    # An expert is used while the sum over the experts before it is below top_p.
    before = torch.zeros_like(probs)
    before[:, 1:] = probs.detach().cumsum(-1)[:, :-1]
    position = torch.arange(num_experts, device=logits.device)
    used = (~(before >= top_p) | (position < min_k))[:, :max_k]

    weights = probs[:, :max_k].masked_fill(~used, 0)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights.masked_fill(~used, 0)
    ids = ids[:, :max_k].masked_fill(~used, -1)
    return weights * routed_scaling_factor, ids.to(torch.int32)

"""expert_choice_router: experts select their tokens, up to a capacity."""

from __future__ import annotations

from torch import Tensor

from moe_ops.ops._autograd import direct_call
from moe_ops.ops._checks import check, check_same_device
from moe_ops.ops._library import register_fake
from moe_ops.ops.topk_router import (
    check_router_logits,
    check_scaling_factor,
    check_score_func,
    fake_router_gradient,
    fake_router_outputs,
    register_router,
)

_expert_choice_router = direct_call("expert_choice_router")


def expert_choice_router(
    router_logits: Tensor,
    capacity: int,
    *,
    score_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Selects, for each expert, the ``capacity`` tokens with the best scores.

    Scores are those of `topk_router`. Ties go to the smaller token, NaN comes last; a capacity of T
    or more selects all tokens. The load is balanced by construction, but a token's experts depend
    on all tokens of the batch, including later ones, and a token may get none.

    Args:
        router_logits: [T, E], E >= 1; float64, float32, bfloat16 or float16, any strides. Under
            autocast they are cast to float32. The gradient has their dtype.
        capacity: tokens per expert, at least 1. Zhou et al. use T * c / E, with c the mean number
            of experts per token.
        score_func: see `topk_router`.
        routed_scaling_factor: multiplies the weights; finite.

    Returns:
        ``topk_weights`` [T, E], float32 (float64 for float64 logits), the scaled scores, and
        ``topk_ids`` [T, E], int32: slots with K = E. The experts that selected a token come first,
        in ascending order; other slots have id -1 and weight 0. T = 0 gives empty tensors. Computed
        in fp32 (fp64 for fp64), bitwise identical for any number of threads. The weights can be
        differentiated once with respect to the logits, for a fixed selection.

    Raises:
        ValueError: wrong dtype or shape, a number out of the ranges above, an unknown name.

    Source:
        Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368.
    """
    return _expert_choice_router(
        router_logits,
        capacity,
        score_func=score_func,
        routed_scaling_factor=routed_scaling_factor,
    )


@register_fake("expert_choice_router")
def _(
    router_logits: Tensor, capacity: int, score_func: str, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    op = "expert_choice_router"
    check_router_logits(op, router_logits)
    check(capacity >= 1, f"{op}: capacity must be at least 1, got {capacity}.")
    check_score_func(op, score_func)
    check_scaling_factor(op, routed_scaling_factor)
    check_same_device(op, router_logits=router_logits)
    return fake_router_outputs(router_logits, router_logits.shape[1])


@register_fake("expert_choice_router_bwd")
def _(
    grad_weights: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    score_func: str,
    routed_scaling_factor: float,
) -> Tensor:
    op = "expert_choice_router_bwd"
    check_score_func(op, score_func)
    return fake_router_gradient(op, grad_weights, router_logits, topk_ids, routed_scaling_factor)


register_router("expert_choice_router", slice(2, None))

"""expert_choice_router: experts choose their tokens under a capacity."""

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
    """Lets each expert choose the ``capacity`` tokens with the best scores.

    The score is that of `topk_router`. Each expert takes its ``capacity``
    best tokens, ties to the smaller token, NaN last; a capacity of T or more takes all. The load is
    balanced by construction, but a token's experts depend on the other tokens of the batch, later
    ones included, and a token may get none.

    Args:
        router_logits: [T, E], E >= 1; float64, float32, bfloat16 or float16, any strides. Under
            autocast they are cast to float32. The gradient has their dtype.
        capacity: tokens an expert takes, at least 1. Zhou et al. use T * c / E, with c the mean
            number of experts per token.
        score_func: as of `topk_router`.
        routed_scaling_factor: multiplies the weights; finite.

    Returns:
        In slot form with K = E: ``topk_weights`` [T, E], float32 (float64 for float64 logits), the
        scaled scores, and ``topk_ids`` [T, E], int32. The experts that chose a token come first, in
        ascending id; the other slots hold id -1 and weight 0. T = 0 gives empty tensors. Computed
        in fp32 (fp64 for fp64), with the same bits for any number of threads. The weights can be
        differentiated once with respect to the logits, the choice being held fixed.

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

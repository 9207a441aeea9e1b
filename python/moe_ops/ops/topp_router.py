"""topp_router: the fewest experts per token that reach a given probability."""

from __future__ import annotations

from torch import Tensor

from moe_ops.ops._autograd import direct_call
from moe_ops.ops._checks import check, check_same_device
from moe_ops.ops._library import register_fake
from moe_ops.ops.topk_router import (
    check_router_logits,
    check_scaling_factor,
    fake_router_gradient,
    fake_router_outputs,
    register_router,
)

_topp_router = direct_call("topp_router")


def topp_router(
    router_logits: Tensor,
    top_p: float,
    max_k: int | None = None,
    *,
    min_k: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Selects the shortest list of experts whose probabilities sum to ``top_p``.

    The experts of a token are ordered by softmax over E, largest first, ties to the smaller id; NaN
    logits come last. The list has at least ``min_k`` and at most ``max_k`` experts. The weights are
    the probabilities; ``renormalize`` divides them by their sum + 1e-20; last, all are multiplied
    by ``routed_scaling_factor``. Rounding may leave the sum of all probabilities below
    ``top_p = 1``: then all experts up to ``max_k`` are used.

    Args:
        router_logits: [T, E], E >= 1; float64, float32, bfloat16 or float16, any strides. Under
            autocast they are cast to float32. The gradient has their dtype.
        top_p: above 0, at most 1.
        max_k: slots per token, from 1 to E; None means E.
        min_k: from 1 to max_k.
        renormalize: makes the weights of a token sum to ``routed_scaling_factor``.
        routed_scaling_factor: finite.

    Returns:
        ``topk_weights`` [T, max_k], float32 (float64 for float64 logits), and ``topk_ids`` [T,
        max_k], int32. Unused slots, all at the end of their row, have id -1 and weight 0. T = 0
        gives empty tensors. Computed in fp32 (fp64 for fp64), bitwise identical for any number of
        threads. The weights can be differentiated once with respect to the logits, for a fixed
        selection.

    Raises:
        ValueError: wrong dtype or shape, a number out of the ranges above.

    Source:
        Huang et al. 2024, Harder Tasks Need More Experts: Dynamic Routing in MoE Models,
        arXiv 2403.07652.
    """
    if max_k is None:
        max_k = router_logits.shape[-1] if router_logits.dim() == 2 else 1
    return _topp_router(
        router_logits,
        top_p,
        max_k,
        min_k=min_k,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )


@register_fake("topp_router")
def _(
    router_logits: Tensor,
    top_p: float,
    max_k: int,
    min_k: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    op = "topp_router"
    check_router_logits(op, router_logits)
    num_experts = router_logits.shape[1]
    check(0 < top_p <= 1, f"{op}: top_p must be above 0 and at most 1, got {top_p:g}.")
    check(
        1 <= max_k <= num_experts, f"{op}: max_k must be from 1 to E = {num_experts}, got {max_k}."
    )
    check(1 <= min_k <= max_k, f"{op}: min_k must be from 1 to max_k = {max_k}, got {min_k}.")
    check_scaling_factor(op, routed_scaling_factor)
    check_same_device(op, router_logits=router_logits)
    return fake_router_outputs(router_logits, max_k)


@register_fake("topp_router_bwd")
def _(
    grad_weights: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    renormalize: bool,
    routed_scaling_factor: float,
) -> Tensor:
    return fake_router_gradient(
        "topp_router_bwd", grad_weights, router_logits, topk_ids, routed_scaling_factor
    )


register_router("topp_router", slice(4, None))

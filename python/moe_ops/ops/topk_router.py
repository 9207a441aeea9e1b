"""topk_router: each token's K experts and their weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.scores import SCORE_FUNCS
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_autograd, register_no_double_backward
from moe_ops.ops._checks import (
    accumulate_dtype,
    check,
    check_choice,
    check_float,
    check_index,
    check_same_device,
)
from moe_ops.ops._library import register_fake

_topk_router = direct_call("topk_router")


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
    """Selects ``top_k`` experts per token and computes their routing weights.

    Selection: the K largest keys of each row, largest first, ties to the smaller id. The key is the
    logit plus ``expert_bias`` with ``topk_first``, otherwise the score plus ``expert_bias``.
    Without a bias and without sums of scores, the logits are compared directly: all score functions
    are monotone, and rounding cannot tie two logits.

    Scores: ``"softmax"`` over E; ``"sigmoid"``; ``"sqrtsoftplus"``, which is sqrt(log(1 +
    exp(logit))). The last one has no upper bound. For negative logits it falls like exp(logit / 2),
    and if that underflows (logits below -208 in fp32), score and gradient are 0.

    Groups: E/num_groups consecutive experts form a group, whose key is the largest key in it
    (``"max"``) or the sum of the two largest (``"top2_sum"``). Experts outside the best
    ``num_topk_groups`` groups (ties to the smaller group) cannot be selected.

    Weights: the score of each selected expert, without the bias; with ``topk_first`` and softmax,
    the softmax over only the K selected logits. ``renormalize`` divides them by their sum + 1e-20.
    Finally, all are multiplied by ``routed_scaling_factor``.

    A key that is NaN ranks below -inf; ids are distinct and valid for all logits, and NaN
    propagates to the weights. An expert with logit -inf has weight 0, unless all logits of the row
    are -inf, which gives NaN.

    Args:
        router_logits: [T, E], E >= 1; float64, float32, bfloat16 or float16, any strides. Under
            autocast they are cast to float32. The gradient has their dtype.
        top_k: K, from 1 to E (to the number of experts in ``num_topk_groups`` groups).
        score_func: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``.
        topk_first: select by logits and score only the selected experts (gpt-oss, Granite), instead
            of scoring all experts first.
        renormalize: makes the weights of a token sum to ``routed_scaling_factor``.
        routed_scaling_factor: finite.
        expert_bias: [E], any float dtype and stride. It affects only the selection and gets no
            gradient.
        num_groups: divides E.
        num_topk_groups: from 1 to num_groups.
        group_score: ``"max"`` or ``"top2_sum"``, which needs two experts in a group.

    Returns:
        ``topk_weights`` [T, K], float32 (float64 for float64 logits), and ``topk_ids`` [T, K],
        int32. T = 0 gives empty tensors. Computed in fp32 (fp64 for fp64), bitwise identical for
        any number of threads. The weights can be differentiated once with respect to the logits.

    Raises:
        ValueError: wrong dtype or shape, a number out of the ranges above, an unknown name.

    Sources:
        Shazeer et al. 2017, Outrageously Large Neural Networks, arXiv 1701.06538 (top-k gating).
        DeepSeek-V2, arXiv 2405.04434 (device-limited groups); Wang et al. 2024, Auxiliary-Loss-Free
        Load Balancing, arXiv 2408.15664 (selection bias); DeepSeek-V3, arXiv 2412.19437 (sigmoid
        scores, groups by the sum of two). DeepSeek-V4 (scores by "sqrtsoftplus").
    """
    return _topk_router(
        router_logits,
        top_k,
        score_func,
        topk_first,
        renormalize,
        routed_scaling_factor,
        expert_bias,
        num_groups,
        num_topk_groups,
        group_score,
    )


def check_router_logits(op: str, router_logits: Tensor) -> None:
    check_float(op, "router_logits", router_logits, "[T, E]")
    check(
        router_logits.shape[1] >= 1,
        f"{op}: router_logits must be [T, E] with at least one expert, "
        f"got shape {list(router_logits.shape)}.",
    )


def check_score_func(op: str, score_func: str) -> None:
    check_choice(op, "score_func", score_func, tuple(SCORE_FUNCS))


def check_scaling_factor(op: str, factor: float) -> None:
    check(math.isfinite(factor), f"{op}: routed_scaling_factor must be finite, got {factor:g}.")


def fake_router_outputs(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (router_logits.shape[0], top_k)
    return (
        router_logits.new_empty(shape, dtype=accumulate_dtype(router_logits.dtype)),
        router_logits.new_empty(shape, dtype=torch.int32),
    )


def fake_router_gradient(
    op: str,
    grad_weights: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    routed_scaling_factor: float,
) -> Tensor:
    check_router_logits(op, router_logits)
    check_index(op, "topk_ids", topk_ids, "[T, K]", T=router_logits.shape[0])
    num_tokens, top_k = topk_ids.shape
    check_float(op, "grad_weights", grad_weights, "[T, K]", T=num_tokens, K=top_k)
    check_scaling_factor(op, routed_scaling_factor)
    check_same_device(op, router_logits=router_logits, topk_ids=topk_ids, grad_weights=grad_weights)
    return router_logits.new_empty(tuple(router_logits.shape))


@register_fake("topk_router")
def _(
    router_logits: Tensor,
    top_k: int,
    score_func: str,
    topk_first: bool,
    renormalize: bool,
    routed_scaling_factor: float,
    expert_bias: Tensor | None,
    num_groups: int,
    num_topk_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    op = "topk_router"
    check_router_logits(op, router_logits)
    num_experts = router_logits.shape[1]
    check(
        1 <= top_k <= num_experts, f"{op}: top_k must be from 1 to E = {num_experts}, got {top_k}."
    )
    check_score_func(op, score_func)
    check_scaling_factor(op, routed_scaling_factor)
    check_choice(op, "group_score", group_score, ("max", "top2_sum"))
    check(
        num_groups >= 1 and num_experts % num_groups == 0,
        f"{op}: num_groups must divide the {num_experts} experts, got {num_groups}.",
    )
    check(
        1 <= num_topk_groups <= num_groups,
        f"{op}: num_topk_groups must be from 1 to num_groups = {num_groups}, "
        f"got {num_topk_groups}.",
    )
    group_size = num_experts // num_groups
    check(
        group_score == "max" or group_size >= 2,
        f"{op}: group_score 'top2_sum' needs at least 2 experts in a group, "
        f"got {num_experts} experts in {num_groups} groups.",
    )
    check(
        top_k <= num_topk_groups * group_size,
        f"{op}: top_k must be at most {num_topk_groups * group_size}, "
        f"the experts in {num_topk_groups} of the groups, got {top_k}.",
    )
    check_float(op, "expert_bias", expert_bias, "[E]", E=num_experts)
    check_same_device(op, router_logits=router_logits, expert_bias=expert_bias)
    return fake_router_outputs(router_logits, top_k)


@register_fake("topk_router_bwd")
def _(
    grad_weights: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    score_func: str,
    topk_first: bool,
    renormalize: bool,
    routed_scaling_factor: float,
) -> Tensor:
    op = "topk_router_bwd"
    check_score_func(op, score_func)
    return fake_router_gradient(op, grad_weights, router_logits, topk_ids, routed_scaling_factor)


def register_router(op: str, used: slice) -> None:
    """Registers the rules of a router whose backward takes the logits, the ids and the arguments in
    `used`."""
    bwd = direct_call(f"{op}_bwd")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.arguments, ctx.num_others = inputs[used], len(inputs) - 1

    def backward(ctx: Any, grad_weights: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        return bwd(grad_weights, *ctx.saved_tensors, *ctx.arguments), *(None,) * ctx.num_others

    register_autograd(op, backward, setup)
    register_no_double_backward(f"{op}_bwd")
    register_autocast(op, ["router_logits"], torch.float32)


register_router("topk_router", slice(2, 6))

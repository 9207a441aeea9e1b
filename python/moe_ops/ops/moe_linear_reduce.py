"""moe_linear_reduce: linear maps of a token's slots by their experts, summed per token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    only_needed,
    register_autograd,
    register_no_double_backward,
    save_inputs,
)
from moe_ops.ops._checks import (
    accumulate_dtype,
    check_float,
    check_index,
    check_like,
    check_same_device,
    new_if,
)
from moe_ops.ops._library import register_fake

_moe_linear_reduce = direct_call("moe_linear_reduce")
_moe_linear_reduce_bwd = direct_call("moe_linear_reduce_bwd")


def moe_linear_reduce(
    h: Tensor, w: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """Projects each slot with its expert's matrix and sums a token's slots with routing weights.

    ``y[t] = sum_k topk_weights[t, k] * (w[e] @ h[t, k] + bias[e])`` with ``e = topk_ids[t, k]``.
    This is the output projection of mixture-of-attention experts.

    Args:
        h: [T, K, D]; float64, float32, bfloat16 or float16, any strides.
        w: [E, H, D] in h's dtype, any strides.
        topk_weights: [T, K] in any float dtype, used in fp32. Differentiable.
        topk_ids: [T, K], int32 or int64; ids outside [0, E) are empty slots, which add nothing even
            if their weight is NaN.
        bias: [E, H] in h's dtype, or None.

    Returns:
        [T, H] in h's dtype; sums in fp32 (fp64 for fp64), in slot order.

    Raises:
        ValueError: wrong dtype, rank or size.
        NotImplementedError: on a second derivative.

    Source:
        Zhang et al. 2022, Mixture of Attention Heads, arXiv 2210.05144.
    """
    return _moe_linear_reduce(h, w, topk_weights, topk_ids, bias)


def _check(
    op: str,
    h: Tensor,
    w: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    bias: Tensor | None,
) -> None:
    check_float(op, "h", h, "[T, K, D]")
    num_tokens, top_k, size = h.shape
    check_like(op, "w", w, "h", h, "[E, H, D]", D=size)
    check_float(op, "topk_weights", topk_weights, "[T, K]", T=num_tokens, K=top_k)
    check_index(op, "topk_ids", topk_ids, "[T, K]", T=num_tokens, K=top_k)
    check_like(op, "bias", bias, "h", h, "[E, H]", E=w.shape[0], H=w.shape[1])
    check_same_device(op, h=h, w=w, topk_weights=topk_weights, topk_ids=topk_ids, bias=bias)


@register_fake("moe_linear_reduce")
def _(*args: Any) -> Tensor:
    _check("moe_linear_reduce", *args)
    h, w, *_ = args
    return h.new_empty((h.shape[0], w.shape[1]))


@register_fake("moe_linear_reduce_bwd")
def _(grad_y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "moe_linear_reduce_bwd"
    *call, need_h, need_w, need_topk_weights, need_bias = args
    _check(op, *call)
    h, w, _, topk_ids, _ = call
    check_like(op, "grad_y", grad_y, "h", h, "[T, H]")
    check_same_device(op, h=h, grad_y=grad_y)
    return (
        new_if(need_h, h),
        new_if(need_w, w),
        new_if(need_topk_weights, h, topk_ids.shape, accumulate_dtype(h.dtype)),
        new_if(need_bias, w, w.shape[:2]),
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    topk_weights = ctx.saved_tensors[2]
    need_h, need_w, need_weights, _, need_bias = needs_input_grad(ctx, 5)
    needs = (need_h, need_w, need_weights, need_bias)
    grads = _moe_linear_reduce_bwd(grad, *ctx.saved_tensors, *needs)
    gh, gw, g_weights, gb = only_needed(grads, needs)
    return gh, gw, None if g_weights is None else g_weights.to(topk_weights.dtype), None, gb


register_autograd("moe_linear_reduce", _backward, save_inputs)
register_no_double_backward("moe_linear_reduce_bwd")
register_autocast("moe_linear_reduce", ["h", "w", "bias"])

"""moe_linear_reduce: a token's slots through their experts and back into one row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    register_autograd,
    register_no_double_backward,
)
from moe_ops.ops._checks import (
    accumulate_dtype,
    check_dim,
    check_float,
    check_index,
    check_same_device,
    check_same_dtype,
    check_size,
)
from moe_ops.ops._library import register_fake

_moe_linear_reduce = direct_call("moe_linear_reduce")
_moe_linear_reduce_bwd = direct_call("moe_linear_reduce_bwd")


def moe_linear_reduce(
    h: Tensor, w: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """Projects each slot with its expert's matrix and sums a token's slots with routing weights.

    ``y[t] = sum_k topk_weights[t, k] * (w[e] @ h[t, k] + bias[e])`` with ``e = topk_ids[t, k]``.
    The output projection of mixture-of-attention experts.

    Args:
        h: [T, K, D]; float64, float32, bfloat16 or float16, any strides.
        w: [E, H, D] in h's dtype, any strides.
        topk_weights: [T, K] in any float dtype, used in fp32. Differentiable.
        topk_ids: [T, K], int32 or int64; anything outside [0, E) means "no expert here": the slot
            adds nothing, even where its weight is NaN.
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
    check_float(op, "h", h)
    check_dim(op, "h", h, 3, "[T, K, D]")
    check_same_dtype(op, "w", w, "h", h)
    check_dim(op, "w", w, 3, "[E, H, D]")
    check_size(op, "w", w, 2, h.shape[2], "D")
    check_float(op, "topk_weights", topk_weights)
    check_index(op, "topk_ids", topk_ids)
    for name, t in (("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        check_dim(op, name, t, 2, "[T, K]")
        check_size(op, name, t, 0, h.shape[0], "T")
        check_size(op, name, t, 1, h.shape[1], "K")
    if bias is not None:
        check_same_dtype(op, "bias", bias, "h", h)
        check_dim(op, "bias", bias, 2, "[E, H]")
        check_size(op, "bias", bias, 0, w.shape[0], "E")
        check_size(op, "bias", bias, 1, w.shape[1], "H")
    check_same_device(op, h=h, w=w, topk_weights=topk_weights, topk_ids=topk_ids, bias=bias)


@register_fake("moe_linear_reduce")
def _(
    h: Tensor, w: Tensor, topk_weights: Tensor, topk_ids: Tensor, bias: Tensor | None = None
) -> Tensor:
    _check("moe_linear_reduce", h, w, topk_weights, topk_ids, bias)
    return h.new_empty((h.shape[0], w.shape[1]))


@register_fake("moe_linear_reduce_bwd")
def _(
    grad_y: Tensor,
    h: Tensor,
    w: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    bias: Tensor | None,
    need_h: bool,
    need_w: bool,
    need_topk_weights: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "moe_linear_reduce_bwd"
    _check(op, h, w, topk_weights, topk_ids, bias)
    check_same_dtype(op, "grad_y", grad_y, "h", h)
    check_same_device(op, h=h, grad_y=grad_y)
    return (
        h.new_empty(tuple(h.shape) if need_h else (0,)),
        h.new_empty(tuple(w.shape) if need_w else (0,)),
        h.new_empty(
            tuple(topk_ids.shape) if need_topk_weights else (0,), dtype=accumulate_dtype(h.dtype)
        ),
        h.new_empty(tuple(w.shape[:2]) if need_bias else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    h, w, topk_weights, topk_ids, bias = ctx.saved_tensors
    need_h, need_w, need_weights, _, need_bias = needs_input_grad(ctx, 5)
    gh, gw, g_weights, gb = _moe_linear_reduce_bwd(
        grad,
        h,
        w,
        topk_weights,
        topk_ids,
        bias,
        need_h,
        need_w,
        need_weights,
        need_bias,
    )
    return (
        gh if need_h else None,
        gw if need_w else None,
        g_weights.to(topk_weights.dtype) if need_weights else None,
        None,
        gb if need_bias else None,
    )


register_autograd("moe_linear_reduce", _backward, _setup)
register_no_double_backward("moe_linear_reduce_bwd")
register_autocast("moe_linear_reduce", ["h", "w", "bias"])

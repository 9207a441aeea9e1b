"""moe_linear_map: linear maps of each token by its experts."""

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
)
from moe_ops.ops._checks import check_float, check_index, check_like, check_same_device, new_if
from moe_ops.ops._library import register_fake

_moe_linear_map = direct_call("moe_linear_map")
_moe_linear_map_bwd = direct_call("moe_linear_map_bwd")


def moe_linear_map(x: Tensor, w: Tensor, topk_ids: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Projects each token with the matrix of each of its experts.

    ``h[t, k] = w[e] @ x[t] + bias[e]`` with ``e = topk_ids[t, k]``; empty slots are zero. This is
    the query projection of mixture-of-attention experts.

    Args:
        x: [T, H]; float64, float32, bfloat16 or float16, any strides.
        w: [E, O, H] in x's dtype, any strides.
        topk_ids: [T, K], int32 or int64; ids outside [0, E) are empty slots.
        bias: [E, O] in x's dtype, or None.

    Returns:
        [T, K, O] in x's dtype; sums in fp32 (fp64 for fp64).

    Raises:
        ValueError: wrong dtype, rank or size.
        NotImplementedError: on a second derivative.

    Source:
        Zhang et al. 2022, Mixture of Attention Heads, arXiv 2210.05144.
    """
    return _moe_linear_map(x, w, topk_ids, bias)


def _check(op: str, x: Tensor, w: Tensor, topk_ids: Tensor, bias: Tensor | None = None) -> None:
    check_float(op, "x", x, "[T, H]")
    check_like(op, "w", w, "x", x, "[E, O, H]", H=x.shape[1])
    check_index(op, "topk_ids", topk_ids, "[T, K]", T=x.shape[0])
    check_like(op, "bias", bias, "x", x, "[E, O]", E=w.shape[0], O=w.shape[1])
    check_same_device(op, x=x, w=w, topk_ids=topk_ids, bias=bias)


@register_fake("moe_linear_map")
def _(*args: Any) -> Tensor:
    _check("moe_linear_map", *args)
    x, w, topk_ids, _ = args
    return x.new_empty((x.shape[0], topk_ids.shape[1], w.shape[1]))


@register_fake("moe_linear_map_bwd")
def _(
    grad_h: Tensor,
    x: Tensor,
    w: Tensor,
    topk_ids: Tensor,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "moe_linear_map_bwd"
    _check(op, x, w, topk_ids)
    check_like(op, "grad_h", grad_h, "x", x, "[T, K, O]")
    check_same_device(op, x=x, grad_h=grad_h)
    return new_if(need_x, x), new_if(need_w, w), new_if(need_bias, w, w.shape[:2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, topk_ids, _ = inputs
    ctx.save_for_backward(x, w, topk_ids)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, topk_ids = ctx.saved_tensors
    need_x, need_w, _, need_bias = needs_input_grad(ctx, 4)
    needs = (need_x, need_w, need_bias)
    gx, gw, gb = only_needed(_moe_linear_map_bwd(grad, x, w, topk_ids, *needs), needs)
    return gx, gw, None, gb


register_autograd("moe_linear_map", _backward, _setup)
register_no_double_backward("moe_linear_map_bwd")
register_autocast("moe_linear_map", ["x", "w", "bias"])

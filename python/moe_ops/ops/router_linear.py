"""router_linear: the router's linear map, from tokens to logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, needs_input_grad, register_autograd
from moe_ops.ops._checks import (
    accumulate_dtype,
    check,
    check_dim,
    check_float,
    check_same_device,
    check_same_dtype,
    check_size,
    dtype_name,
)
from moe_ops.ops._library import register_cuda_formula, register_fake

_router_linear = direct_call("router_linear")
_router_linear_bwd = direct_call("router_linear_bwd")


def router_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """Logits of a router, ``x weight^T + bias``: `F.linear` for few columns.

    Libraries for large matrices take products with 4 to 64 columns at a fraction of their speed.
    Here all gradients, too, are one pass over x and the gradient of the logits. On CUDA tensors it
    is `F.linear`.

    Args:
        x: [T, H]; float64, float32, bfloat16 or float16, any strides.
        weight: [E, H] in x's dtype, E >= 1.
        bias: [E] in x's dtype, or None.
        logits_dtype: x's dtype (None), or float32 for bfloat16 and float16 x: the sums as they are.

    Returns:
        router_logits [T, E] in logits_dtype, summed in fp32 (fp64 for fp64). Differentiable any
        number of times.

    Raises:
        ValueError: wrong dtype, rank or size.
    """
    if x.is_cuda:
        return _formula(x, weight, bias, logits_dtype)
    return _router_linear(x, weight, bias, logits_dtype)


@register_cuda_formula("router_linear")
def _formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    _check("router_linear", x, weight, bias)
    dtype = logits_dtype or x.dtype
    _check_logits_dtype("router_linear", "logits_dtype", dtype, x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_float(op, "x", x)
    check_dim(op, "x", x, 2, "[T, H]")
    check_same_dtype(op, "weight", weight, "x", x)
    check_dim(op, "weight", weight, 2, "[E, H]")
    check_size(op, "weight", weight, 1, x.shape[1], "H")
    num_experts = weight.shape[0]
    check(num_experts >= 1, f"{op}: num_experts must be at least 1, got {num_experts}.")
    if bias is not None:
        check_same_dtype(op, "bias", bias, "x", x)
        check_dim(op, "bias", bias, 1, "[E]")
        check_size(op, "bias", bias, 0, num_experts, "E")
    check_same_device(op, x=x, weight=weight, bias=bias)


def _check_logits_dtype(op: str, name: str, dtype: torch.dtype, x: Tensor) -> None:
    wanted = dict.fromkeys((x.dtype, accumulate_dtype(x.dtype)))
    names = " or ".join(dtype_name(d) for d in wanted)
    check(dtype in wanted, f"{op}: {name} must be {names}, got {dtype_name(dtype)}.")


def _check_bwd(grad_logits: Tensor, x: Tensor, weight: Tensor) -> None:
    op = "router_linear_bwd"
    _check(op, x, weight, None)
    _check_logits_dtype(op, "grad_logits", grad_logits.dtype, x)
    check_dim(op, "grad_logits", grad_logits, 2, "[T, E]")
    check_size(op, "grad_logits", grad_logits, 0, x.shape[0], "T")
    check_size(op, "grad_logits", grad_logits, 1, weight.shape[0], "E")
    check_same_device(op, x=x, grad_logits=grad_logits)


@register_fake("router_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    _check("router_linear", x, weight, bias)
    dtype = logits_dtype or x.dtype
    _check_logits_dtype("router_linear", "logits_dtype", dtype, x)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


@register_fake("router_linear_bwd")
def _(
    grad_logits: Tensor,
    x: Tensor,
    weight: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_bwd(grad_logits, x, weight)
    return (
        x.new_empty(tuple(x.shape) if need_x else (0,)),
        x.new_empty(tuple(weight.shape) if need_weight else (0,)),
        x.new_empty((weight.shape[0] if need_bias else 0,)),
    )


@register_cuda_formula("router_linear_bwd")
def _bwd_formula(
    grad_logits: Tensor,
    x: Tensor,
    weight: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_bwd(grad_logits, x, weight)
    g = grad_logits
    none = x.new_empty(0)
    return (
        (g @ weight.to(g.dtype)).to(x.dtype) if need_x else none,
        (g.T @ x.to(g.dtype)).to(x.dtype) if need_weight else none.clone(),
        g.sum(0, dtype=accumulate_dtype(x.dtype)).to(x.dtype) if need_bias else none.clone(),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs = needs_input_grad(ctx, 3)
    grads = _router_linear_bwd(grad, x, weight, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def _setup_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.needs = inputs[3:]


def _backward_bwd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    # With g the gradient of the logits: grad_x = g W, grad_W = g^T x, grad_b = sum g.
    saved = ctx.saved_tensors
    acc = accumulate_dtype(saved[1].dtype)
    g, x, weight = (t.to(acc) for t in saved)
    dx, dw, db = (
        d.to(acc) if d is not None and need else None
        for d, need in zip(grads, ctx.needs, strict=True)
    )
    need_g, need_x, need_weight = needs_input_grad(ctx, 3)
    to_g: Tensor | None = None
    if need_g:
        to_g = torch.zeros_like(g)
        if dx is not None:
            to_g = to_g + dx @ weight.T
        if dw is not None:
            to_g = to_g + x @ dw.T
        if db is not None:
            to_g = to_g + db
        to_g = to_g.to(saved[0].dtype)
    to_x = (g @ dw).to(saved[1].dtype) if need_x and dw is not None else None
    to_weight = (g.T @ dx).to(saved[2].dtype) if need_weight and dx is not None else None
    return to_g, to_x, to_weight, None, None, None


register_autograd("router_linear", _backward, _setup)
register_autograd("router_linear_bwd", _backward_bwd, _setup_bwd)
register_autocast("router_linear", ["x", "weight", "bias"])

"""router_linear: the router's linear map from tokens to logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas import router_linear as formulas
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, needs_input_grad, only_needed, register_autograd
from moe_ops.ops._checks import (
    accumulate_dtype,
    check_float,
    check_like,
    check_positive,
    check_result_dtype,
    check_same_device,
    check_shape,
    given,
    new_if,
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
    """Computes a router's logits ``x weight^T + bias``: `F.linear` for few output columns.

    Libraries for large matrices run GEMMs with 4 to 64 columns at a fraction of their speed. All
    gradients take one pass over x and the gradient of the logits. On CUDA tensors it calls
    `F.linear`.

    Args:
        x: [T, H]; float64, float32, bfloat16 or float16, any strides.
        weight: [E, H] in x's dtype, E >= 1.
        bias: [E] in x's dtype, or None.
        logits_dtype: x's dtype (None), or float32 for bfloat16 and float16 x, the unrounded sums.

    Returns:
        router_logits [T, E] in logits_dtype, summed in fp32 (fp64 for fp64). Differentiable any
        number of times.

    Raises:
        ValueError: wrong dtype, rank or size.
    """
    if x.is_cuda:
        _check("router_linear", x, weight, bias)
        check_result_dtype("router_linear", "logits_dtype", logits_dtype or x.dtype, x)
        return formulas.router_linear(x, weight, bias, logits_dtype=logits_dtype)
    return _router_linear(x, weight, bias, logits_dtype)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_float(op, "x", x, "[T, H]")
    check_like(op, "weight", weight, "x", x, "[E, H]", H=x.shape[1])
    num_experts = weight.shape[0]
    check_positive(op, num_experts=num_experts)
    check_like(op, "bias", bias, "x", x, "[E]", E=num_experts)
    check_same_device(op, x=x, weight=weight, bias=bias)


@register_fake("router_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None) -> Tensor:
    _check("router_linear", x, weight, bias)
    dtype = logits_dtype or x.dtype
    check_result_dtype("router_linear", "logits_dtype", dtype, x)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


@register_fake("router_linear_bwd")
def _(
    grad_logits: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    op = "router_linear_bwd"
    _check(op, x, weight, None)
    check_result_dtype(op, "grad_logits", grad_logits.dtype, x)
    shape = "[T, E]"
    check_shape(op, "grad_logits", grad_logits, shape, T=x.shape[0], E=weight.shape[0])
    check_same_device(op, x=x, grad_logits=grad_logits)
    return new_if(need_x, x), new_if(need_weight, weight), new_if(need_bias, x, weight.shape[:1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs = needs_input_grad(ctx, 3)
    grads = _router_linear_bwd(grad, x, weight, *needs)
    return *only_needed(grads, needs), None


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


@register_cuda_formula("router_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None) -> Tensor:
    return formulas.router_linear(x, weight, bias, logits_dtype=logits_dtype)


@register_cuda_formula("router_linear_bwd")
def _(grad_logits: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return given(formulas.backward(grad_logits, x, *args), x)

"""add_rms_norm: residual addition followed by RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas import add_rms_norm as formulas
from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    register_autograd,
    register_no_double_backward,
)
from moe_ops.ops._checks import (
    accumulate_dtype,
    check,
    check_dim,
    check_dtype,
    check_float,
    check_like,
    check_same_device,
    check_size,
    given,
    new_if,
    new_like,
)
from moe_ops.ops._library import register_cuda_formula, register_fake

_add_rms_norm = direct_call("add_rms_norm")
_add_rms_norm_bwd = direct_call("add_rms_norm_bwd")


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Adds a residual and a bias, and applies RMSNorm to the sum.

    ``sum = x + residual + bias`` and ``y = sum / sqrt(mean(sum ** 2) + eps) * weight``, with the
    mean over the last dimension. It takes one pass over memory, forward and backward.

    On CUDA tensors and in compiled code, the formula is composed of torch operations, which the
    compiler fuses with their neighbors. In batch-invariant mode, this package's GEMM sums the
    squares of a CUDA tensor.

    Args:
        x: [..., H], at least one dimension; float64, float32, bfloat16 or float16, any strides.
        weight: [H] in x's dtype.
        residual: like x, or None.
        bias: [H] in x's dtype, or None.
        eps: at least 0.

    Returns:
        y and sum, [..., H] in x's dtype, computed in fp32 (fp64 for fp64); y is computed from the
        rounded sum. With neither residual nor bias, sum is x itself.

    Raises:
        ValueError: wrong dtype, rank or size, a negative or NaN eps.
        NotImplementedError: on a second derivative, on the CPU.

    Source:
        Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    if (x.is_cuda and not is_batch_invariant_enabled()) or torch.compiler.is_compiling():
        _check("add_rms_norm", x, weight, residual, bias, eps)
        return formulas.add_rms_norm(x, weight, residual, bias=bias, eps=eps)
    y, total, _ = _add_rms_norm(x, weight, residual, bias, float(eps))
    return y, x if residual is None and bias is None else total


def _check(
    op: str, x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    check_float(op, "x", x)
    check(x.dim() >= 1, f"{op}: x must be [..., H], got shape {list(x.shape)}.")
    for name, t in (("weight", weight), ("bias", bias)):
        check_like(op, name, t, "x", x, "[H]", H=x.shape[-1])
    _check_same_shape(op, "residual", residual, "x", x)
    check(eps >= 0, f"{op}: eps must be at least 0, got {eps}.")
    check_same_device(op, x=x, weight=weight, residual=residual, bias=bias)


def _check_same_shape(op: str, name: str, t: Tensor | None, like_name: str, like: Tensor) -> None:
    if t is None:
        return
    check_dtype(op, name, t.dtype, (like.dtype,), f" like {like_name}")
    check_dim(op, name, t, like.dim(), "[..., H]")
    for d in range(like.dim()):
        check_size(op, name, t, d, like.shape[d], f"{like_name}'s size")


def _rows(x: Tensor) -> Any:
    return x.shape[:-1].numel() if x.shape[-1] else 0


@register_fake("add_rms_norm")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check("add_rms_norm", *args)
    x, _, residual, bias, _ = args
    adds = residual is not None or bias is not None
    rstd = x.new_empty((_rows(x),), dtype=accumulate_dtype(x.dtype))
    return new_like(x), new_if(adds, x), rstd


@register_fake("add_rms_norm_bwd")
def _(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "add_rms_norm_bwd"
    _check(op, sum, weight, None, None, 0.0)
    for name, t in (("grad_y", grad_y), ("grad_sum", grad_sum)):
        _check_same_shape(op, name, t, "sum", sum)
    check_same_device(op, sum=sum, grad_y=grad_y, grad_sum=grad_sum, rstd=rstd)
    size = sum.shape[-1:]
    return new_if(need_x, sum), new_if(need_weight, sum, size), new_if(need_bias, sum, size)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, residual, bias, _ = inputs
    _, total, rstd = output
    ctx.adds = residual is not None or bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(total if ctx.adds else x, weight, rstd)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    total, weight, rstd = ctx.saved_tensors
    need_x, need_weight, need_residual, need_bias = needs_input_grad(ctx, 4)
    if grad_y is None:
        if grad_sum is None:
            return (None,) * 5
        grad_y = torch.zeros_like(total)
    gx, gw, gb = _add_rms_norm_bwd(
        grad_y,
        grad_sum if ctx.adds else None,
        total,
        weight,
        rstd,
        need_x or need_residual,
        need_weight,
        need_bias,
    )
    return (
        gx if need_x else None,
        gw if need_weight else None,
        gx if need_residual else None,
        gb if need_bias else None,
        None,
    )


register_autograd("add_rms_norm", _backward, _setup)
register_no_double_backward("add_rms_norm_bwd")
register_autocast("add_rms_norm")


@register_cuda_formula("add_rms_norm")
def _(
    x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, rstd = formulas.forward(x, weight, residual, bias, eps)
    adds = residual is not None or bias is not None
    return y.contiguous(), total.contiguous() if adds else new_if(False, x), rstd


@register_cuda_formula("add_rms_norm_bwd")
def _(grad_y: Tensor, grad_sum: Tensor | None, sum: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return given(formulas.backward(grad_y, grad_sum, sum, *args), sum)

"""grouped_gemm, its weight gradient and its bias gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    register_autograd,
    save_inputs,
)
from moe_ops.ops._checks import (
    check_float,
    check_like,
    check_offsets,
    check_same_device,
    check_size,
    is_stored_transposed,
)
from moe_ops.ops._library import register_fake

_grouped_gemm = direct_call("grouped_gemm")
_grouped_gemm_wgrad = direct_call("grouped_gemm_wgrad")
_grouped_sum = direct_call("grouped_sum")


def grouped_gemm(
    a: Tensor, b: Tensor, expert_offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """Multiplies each expert's rows with that expert's matrix (ragged M).

    ``out[r] = b[e] @ a[r] + bias[e]`` for ``expert_offsets[e] <= r < expert_offsets[e+1]``; rows
    from ``expert_offsets[E]`` on are zero. Sums run in fp32 (fp64 for fp64) in a fixed order, so
    results are bitwise identical for every run and number of threads. Experts without rows cost
    nothing. Differentiable any number of times in a, b and bias.

    Args:
        a: [N, K] rows sorted by expert; float64, float32, bfloat16 or float16, any strides.
        b: [E, O, K], out-features before in-features like ``nn.Linear``, in a's dtype. Any strides:
            a transposed view of a dense [E, K, O] tensor is read in place.
        expert_offsets: [E+1], int32 or int64, starting at 0, nondecreasing, at most N.
        bias: [E, O] in a's dtype, or None.

    Returns:
        [N, O] in a's dtype.

    Raises:
        ValueError: wrong dtype, rank or size; decreasing offsets, or offsets above N.
    """
    return _grouped_gemm(a, b, expert_offsets, bias)


def grouped_gemm_wgrad(grad: Tensor, a: Tensor, expert_offsets: Tensor) -> Tensor:
    """Computes the weight gradient of :func:`grouped_gemm` (ragged K).

    ``out[e] = sum over the rows r of expert e of outer(grad[r], a[r])``, in row order in fp32 (fp64
    for fp64). An expert without rows gets zeros. Differentiable any number of times.

    Args:
        grad: [N, O]; float64, float32, bfloat16 or float16, any strides (expanded ones too).
        a: [N, K] in grad's dtype.
        expert_offsets: [E+1], int32 or int64.

    Returns:
        [E, O, K] in grad's dtype.

    Raises:
        ValueError: wrong dtype, rank or size; decreasing offsets, or offsets above N.
    """
    return _grouped_gemm_wgrad(grad, a, expert_offsets)


def grouped_sum(rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """Sums each expert's rows, which is the bias gradient of :func:`grouped_gemm`.

    Args:
        rows: [N, O]; float64, float32, bfloat16 or float16, any strides.
        expert_offsets: [E+1], int32 or int64.

    Returns:
        [E, O] in the dtype of rows, summed in row order in fp32 (fp64 for fp64). An expert without
        rows gets zeros. Differentiable any number of times.

    Raises:
        ValueError: wrong dtype, rank or size; decreasing offsets, or offsets above N.
    """
    return _grouped_sum(rows, expert_offsets)


@register_fake("grouped_gemm")
def _(a: Tensor, b: Tensor, expert_offsets: Tensor, bias: Tensor | None) -> Tensor:
    op = "grouped_gemm"
    check_float(op, "a", a, "[N, K]")
    check_like(op, "b", b, "a", a, "[E, O, K]", K=a.shape[1])
    check_offsets(op, expert_offsets)
    check_same_device(op, a=a, b=b, bias=bias, expert_offsets=expert_offsets)
    check_size(op, "expert_offsets", expert_offsets, 0, b.shape[0] + 1, "E+1")
    check_like(op, "bias", bias, "a", a, "[E, O]", E=b.shape[0], O=b.shape[1])
    return a.new_empty((a.shape[0], b.shape[1]))


@register_fake("grouped_gemm_wgrad")
def _(grad: Tensor, a: Tensor, expert_offsets: Tensor) -> Tensor:
    op = "grouped_gemm_wgrad"
    check_float(op, "grad", grad, "[N, O]")
    check_like(op, "a", a, "grad", grad, "[N, K]", N=grad.shape[0])
    check_offsets(op, expert_offsets)
    check_same_device(op, grad=grad, a=a, expert_offsets=expert_offsets)
    return grad.new_empty((expert_offsets.shape[0] - 1, grad.shape[1], a.shape[1]))


@register_fake("grouped_sum")
def _(rows: Tensor, expert_offsets: Tensor) -> Tensor:
    op = "grouped_sum"
    check_float(op, "rows", rows, "[N, O]")
    check_offsets(op, expert_offsets)
    check_same_device(op, rows=rows, expert_offsets=expert_offsets)
    return rows.new_empty((expert_offsets.shape[0] - 1, rows.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, expert_offsets, _ = inputs
    need_a, need_b, _, _ = needs_input_grad(ctx, 4)
    ctx.save_for_backward(a if need_b else None, b if need_a else None, expert_offsets)
    ctx.is_b_transposed = is_stored_transposed(b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, b, expert_offsets = ctx.saved_tensors
    ops = torch.ops.moe_ops
    need_a, need_b, _, need_bias = needs_input_grad(ctx, 4)
    grad_a = grad_b = grad_bias = None
    if need_a:
        grad_a = ops.grouped_gemm(grad, b.transpose(1, 2), expert_offsets)
    if need_b:
        if ctx.is_b_transposed:
            grad_b = ops.grouped_gemm_wgrad(a, grad, expert_offsets).mT
        else:
            grad_b = ops.grouped_gemm_wgrad(grad, a, expert_offsets)
    if need_bias:
        grad_bias = ops.grouped_sum(grad, expert_offsets)
    return grad_a, grad_b, None, grad_bias


def _backward_wgrad(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    grad, a, expert_offsets = ctx.saved_tensors
    ops = torch.ops.moe_ops
    d_grad = d_a = None
    if ctx.needs_input_grad[0]:
        d_grad = ops.grouped_gemm(a, g, expert_offsets)
    if ctx.needs_input_grad[1]:
        d_a = ops.grouped_gemm(grad, g.transpose(1, 2), expert_offsets)
    return d_grad, d_a, None


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, expert_offsets = inputs
    ctx.save_for_backward(expert_offsets)
    ctx.num_rows = rows.shape[0]


def _backward_sum(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (expert_offsets,) = ctx.saved_tensors
    row = torch.arange(ctx.num_rows, device=grad.device)
    expert = torch.bucketize(row, expert_offsets[1:].to(torch.int64), right=True)
    valid = expert < grad.shape[0]
    spread = grad[expert.clamp(max=grad.shape[0] - 1)]
    return torch.where(valid[:, None], spread, grad.new_zeros(())), None


register_autograd("grouped_gemm", _backward, _setup)
register_autograd("grouped_gemm_wgrad", _backward_wgrad, save_inputs)
register_autograd("grouped_sum", _backward_sum, _setup_sum)
register_autocast("grouped_gemm", ["a", "b", "bias"])
register_autocast("grouped_gemm_wgrad", ["grad", "a"])
register_autocast("grouped_sum")

"""grouped_gemm_quantized: grouped_gemm of weights of few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.codes import dequantized
from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    register_autograd,
    register_gradient_of,
)
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check,
    check_like,
    check_offsets,
    check_same_device,
    check_size,
    check_tensor,
)
from moe_ops.ops._library import register_cuda_formula, register_fake
from moe_ops.ops._quantized import check_weight, reads_stored

_grouped_gemm_quantized = direct_call("grouped_gemm_quantized")
_exact = direct_call("grouped_gemm_quantized_exact")

_OP = "grouped_gemm_quantized"


def grouped_gemm_quantized(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
    *,
    format: str,
    bias: Tensor | None = None,
    b_zero: Tensor | None = None,
) -> Tensor:
    """Computes grouped_gemm with quantized weights; a dense layer has one expert.

    ``out[r] = w[e] @ a[r] + bias[e]``, where w is the dequantized b. The formats, and the integers
    that the CPU uses for rows, are those of :func:`moe_ffn_quantized`. If a gradient is requested,
    it is :func:`grouped_gemm` with the dequantized weights: rows are not rounded, and a and bias
    have gradients. The CPU then dequantizes weights in cache, forward and backward. In the
    batch-invariant mode, the CPU computes the values of a call with a gradient as of one without.

    CUDA kernels never round rows. In calls of up to 64 rows per expert, and of any size in the
    batch-invariant mode, they read weights as they are stored, with a gradient or without, and
    scales multiply sums in fp32. In larger calls, some experts at a time, weights are rounded to
    a's dtype.

    Args:
        a: [N, K] rows sorted by expert; float32, bfloat16 or float16, any strides.
        b, b_scale: quantized weights of [E, O, K] and their scales, as `format` stores them.
        expert_offsets: [E+1], int32 or int64, from 0, never falling, at most N.
        format: name of b's format, see :func:`moe_ffn_quantized`; for example "int4 g64".
        bias: [E, O] in a's dtype, or None.
        b_zero: uint8 [E, O, K/G], zero points, if the format has them; otherwise None.

    Returns:
        [N, O] in a's dtype; rows from ``expert_offsets[E]`` on are zero.

    Raises:
        ValueError: an unknown format; wrong dtype, rank or size; offsets that fall or end past N.

    Source:
        As of :func:`moe_ffn_quantized`.
    """
    zero = () if b_zero is None else (b_zero,)
    args = (a, b, b_scale, expert_offsets, format, bias, *zero)
    if a.device.type == "cuda" and not reads_stored(a.shape[0], b.shape[0]):
        return _exact(*args)
    out = _grouped_gemm_quantized(*args)
    if out.requires_grad and out.device.type == "cpu" and is_batch_invariant_enabled():
        with torch.no_grad():
            out.copy_(_grouped_gemm_quantized(*args))  # Backward does not read it.
    return out


@register_fake(f"{_OP}_exact")
def _fake_exact(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
    format: str,
    bias: Tensor | None,
    b_zero: Tensor | None,
    transposed: bool,
) -> Tensor:
    check_tensor(_OP, "a", a, NARROW_FLOATS, "[N, K]")
    depth = check_weight(_OP, "b", b, b_scale, b_zero, format)
    sizes = (b.shape[1], depth) if transposed else (depth, b.shape[1])
    check(
        sizes[0] == a.shape[1],
        f"{_OP}: b must have rows of K = {a.shape[1]} weights, got {sizes[0]} "
        f"(shape {list(b.shape)}).",
    )
    check_like(_OP, "bias", bias, "a", a, "[E, O]", E=b.shape[0], O=sizes[1])
    check_offsets(_OP, expert_offsets)
    check_same_device(_OP, a=a, b=b, b_scale=b_scale, expert_offsets=expert_offsets, bias=bias)
    check_size(_OP, "expert_offsets", expert_offsets, 0, b.shape[0] + 1, "E+1")
    return a.new_empty((a.shape[0], sizes[1]))


@register_fake(_OP)
def _(*args: Any) -> Tensor:
    return _fake_exact(*args, False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, b, b_scale, expert_offsets, format, _, b_zero, transposed = inputs
    ctx.save_for_backward(b, b_scale, expert_offsets, b_zero)
    ctx.format, ctx.transposed = format, transposed


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    b, b_scale, expert_offsets, b_zero = ctx.saved_tensors
    needs = needs_input_grad(ctx, 8)
    grad_a = grad_bias = None
    if needs[0]:
        rest = (None, b_zero, not ctx.transposed)
        grad_a = _exact(grad, b, b_scale, expert_offsets, ctx.format, *rest)
    if needs[5]:
        grad_bias = torch.ops.moe_ops.grouped_sum(grad, expert_offsets)
    return grad_a, None, None, None, None, grad_bias, None, None


register_autograd(f"{_OP}_exact", _backward, _setup)
register_gradient_of(_OP, _exact)
register_autocast(_OP, ["a", "bias"])
register_autocast(f"{_OP}_exact", ["a", "bias"])

# Experts are dequantized some at a time, which their products outlast.
_CHUNK_BYTES = 1 << 27


@register_cuda_formula("grouped_gemm_quantized_exact")
def _(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
    format: str,
    bias: Tensor | None,
    b_zero: Tensor | None,
    transposed: bool,
) -> Tensor:
    experts = b.shape[0]
    if not transposed and reads_stored(a.shape[0], experts):
        args = (a, b, b_scale, expert_offsets, format, bias, b_zero)
        return torch.ops.moe_ops.grouped_gemm_quantized(*args)
    matrix = b[0].numel() * 2 if experts else 1  # at least the weights of an expert, or nearly
    step = max(1, _CHUNK_BYTES // max(matrix * a.element_size(), 1))
    out = None
    for first in range(0, max(experts, 1), step):
        part = slice(first, min(first + step, experts))
        zero = None if b_zero is None else b_zero[part]
        w = dequantized(b[part], b_scale[part], zero, format=format, dtype=torch.float32)
        w = w.to(a.dtype)
        w = w.mT.contiguous() if transposed else w
        offsets, own_bias = expert_offsets, bias
        if step < experts:  # Rows of the experts before these meet zeros.
            w = torch.cat([w.new_zeros(1, *w.shape[1:]), w])
            offsets = torch.cat([expert_offsets[:1], expert_offsets[part.start : part.stop + 1]])
            if bias is not None:
                own_bias = torch.cat([bias.new_zeros(1, bias.shape[1]), bias[part]])
        y = torch.ops.moe_ops.grouped_gemm(a, w, offsets, own_bias)
        out = y if out is None else out + y
    assert out is not None
    return out

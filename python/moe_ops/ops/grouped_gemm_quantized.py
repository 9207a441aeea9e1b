"""grouped_gemm_quantized: grouped_gemm of weights of 8 or 4 bits."""

from __future__ import annotations

from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_gradient_of
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
from moe_ops.ops._quantized import check_quantized
from moe_ops.ops.grouped_gemm import grouped_gemm
from moe_ops.reference.moe_ffn_quantized import dequantized

_grouped_gemm_quantized = direct_call("grouped_gemm_quantized")

_OP = "grouped_gemm_quantized"


def grouped_gemm_quantized(
    a: Tensor, b: Tensor, b_scale: Tensor, expert_offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """grouped_gemm with weights of 8 or 4 bits; a dense layer is one expert.

    ``out[r] = w[e] @ a[r] + bias[e]`` with w what codes and scales stand for. Formats, and the
    integers that rows become on the CPU, are those of :func:`moe_ffn_quantized`. Where a gradient
    is wanted, and on CUDA tensors, it is :func:`grouped_gemm` of the dequantised weights, in a's
    dtype: rows stay as they are, and a and bias have gradients.

    Args:
        a: [N, K] rows sorted by expert; float32, bfloat16 or float16, any strides.
        b: [E, O, K] int8, or [E, O, K/2] uint8 with two weights of 4 bits a byte.
        b_scale: float32, [E, O], or [E, O, K/G] with G = 32, 64 or 128.
        expert_offsets: [E+1], int32 or int64, from 0, never falling, at most N.
        bias: [E, O] in a's dtype, or None.

    Returns:
        [N, O] in a's dtype; rows from ``expert_offsets[E]`` on are zero.

    Raises:
        ValueError: wrong dtype, rank or size; offsets that fall or end past N.

    Source:
        As of :func:`moe_ffn_quantized`.
    """
    return _grouped_gemm_quantized(a, b, b_scale, expert_offsets, bias)


@register_fake(_OP)
def _(a: Tensor, b: Tensor, b_scale: Tensor, expert_offsets: Tensor, bias: Tensor | None) -> Tensor:
    check_tensor(_OP, "a", a, NARROW_FLOATS, "[N, K]")
    depth = check_quantized(_OP, "b", b, b_scale)
    check(
        depth == a.shape[1],
        f"{_OP}: b must have rows of K = {a.shape[1]} weights, got {depth} "
        f"(shape {list(b.shape)}).",
    )
    check_like(_OP, "bias", bias, "a", a, "[E, O]", E=b.shape[0], O=b.shape[1])
    check_offsets(_OP, expert_offsets)
    check_same_device(_OP, a=a, b=b, b_scale=b_scale, expert_offsets=expert_offsets, bias=bias)
    check_size(_OP, "expert_offsets", expert_offsets, 0, b.shape[0] + 1, "E+1")
    return a.new_empty((a.shape[0], b.shape[1]))


def _formula(
    a: Tensor, b: Tensor, b_scale: Tensor, expert_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    weights = dequantized(b, b_scale).to(a.dtype)
    return grouped_gemm(a, weights, expert_offsets, bias=bias)


register_gradient_of(_OP, _formula)
register_cuda_formula("grouped_gemm_quantized")(_formula)
register_autocast(_OP, ["a", "bias"])

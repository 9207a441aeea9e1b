"""grouped_gemm_fp8: the ragged-M product of float8_e4m3fn operands with 128-block scales."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check_dim,
    check_dtype,
    check_offsets,
    check_same_device,
    check_size,
    check_tensor,
)
from moe_ops.ops._library import register_fake
from moe_ops.ops.quantize_fp8 import FP8, fp8_blocks

_grouped_gemm_fp8 = direct_call("grouped_gemm_fp8")

_OP = "grouped_gemm_fp8"


def grouped_gemm_fp8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """grouped_gemm of float8_e4m3fn operands in the layout of DeepSeek's checkpoints.

    a has a scale for each 1 x 128 (:func:`quantize_fp8`), b one for each 128 x 128
    (``moe_ops.quant.quantize_fp8_blocks``, or ``weight_scale_inv`` of a checkpoint):

    ``out[r, o] = bias[e, o] + sum over blocks j of
    a_scale[r, j] * b_scale[e, o // 128, j] * (sum over k of block j of a[r, k] * b[e, o, k])``

    for ``expert_offsets[e] <= r < expert_offsets[e+1]``; rows from ``expert_offsets[E]`` on are
    zero. The products of a block are summed in an fp32 accumulator of their own, which is scaled
    and added to a second one. On the CPU and in the kernels for any card the products are exact;
    the tensor cores of sm_90 sum e4m3 products with fewer bits than fp32 inside an instruction,
    which the second accumulator keeps from growing with K. In a fixed order: the same bits every
    run. For inference.

    Args:
        a: [N, K] float8_e4m3fn rows sorted by expert; any strides. K need not be a multiple of 128.
        a_scale: [N, ceil(K / 128)] float32.
        b: [E, O, K] float8_e4m3fn, out-features before in-features. Any strides; dense along K is
            what kernels read in place.
        b_scale: [E, ceil(O / 128), ceil(K / 128)] float32.
        expert_offsets: [E+1], int32 or int64, from 0, never falling, at most N.
        bias: [E, O] float32, bfloat16 or float16, or None.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [N, O] of out_dtype.

    Raises:
        ValueError: wrong dtype, rank or size; offsets that fall or end past N (on the CPU).
        NotImplementedError: where a gradient is wanted.

    Source:
        DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2.
    """
    return _grouped_gemm_fp8(a, a_scale, b, b_scale, expert_offsets, out_dtype, bias)


def check_fp8_weights(op: str, name: str, w: Tensor, scale: Tensor) -> None:
    check_tensor(op, name, w, (FP8,), "[E, O, K]")
    num_experts, features, depth = w.shape
    scale_name = f"{name}_scale"
    check_tensor(op, scale_name, scale, (torch.float32,))
    check_dim(op, scale_name, scale, 3, "one scale for 128 x 128 of each expert")
    check_size(op, scale_name, scale, 0, num_experts, "E")
    check_size(op, scale_name, scale, 1, fp8_blocks(features), "the blocks of 128 features")
    check_size(op, scale_name, scale, 2, fp8_blocks(depth), "the blocks of 128 inputs")


@register_fake(_OP)
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    check_tensor(_OP, "a", a, (FP8,), "[N, K]")
    check_tensor(_OP, "a_scale", a_scale, (torch.float32,), "[N, ceil(K / 128)]", N=a.shape[0])
    check_size(_OP, "a_scale", a_scale, 1, fp8_blocks(a.shape[1]), "the blocks of 128 inputs")
    check_fp8_weights(_OP, "b", b, b_scale)
    check_size(_OP, "b", b, 2, a.shape[1], "K")
    check_tensor(_OP, "bias", bias, NARROW_FLOATS, "[E, O]", E=b.shape[0], O=b.shape[1])
    check_dtype(_OP, "out_dtype", out_dtype, NARROW_FLOATS)
    check_offsets(_OP, expert_offsets)
    check_size(_OP, "expert_offsets", expert_offsets, 0, b.shape[0] + 1, "E+1")
    check_same_device(
        _OP,
        a=a,
        a_scale=a_scale,
        b=b,
        b_scale=b_scale,
        expert_offsets=expert_offsets,
        bias=bias,
    )
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


register_no_gradient(_OP, "dequantise the operands and call grouped_gemm")
# The type of the result is an argument, and those of the operands are what the op is about.
register_autocast(_OP)

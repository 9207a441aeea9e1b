"""grouped_gemm_fp8: ragged-M GEMM of float8_e4m3fn operands with 128-block scales, and its weight
gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check,
    check_dim,
    check_dtype,
    check_offsets,
    check_same_device,
    check_size,
    check_tensor,
)
from moe_ops.ops._library import register_fake
from moe_ops.ops.quantize_fp8 import FP8, FP8_BLOCK, fp8_blocks

_grouped_gemm_fp8 = direct_call("grouped_gemm_fp8")
_grouped_gemm_fp8_wgrad = direct_call("grouped_gemm_fp8_wgrad")
_accumulate = direct_call("grouped_gemm_fp8_wgrad_accumulate")

_OP = "grouped_gemm_fp8"
_WGRAD_OP = "grouped_gemm_fp8_wgrad"
_ACCUMULATE_OP = "grouped_gemm_fp8_wgrad_accumulate"


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
    """Computes grouped_gemm of float8_e4m3fn operands in the layout of DeepSeek's checkpoints.

    a has one scale per 1 x 128 block (:func:`quantize_fp8`), b one per 128 x 128 block
    (``moe_ops.quant.quantize_fp8_blocks``, or ``weight_scale_inv`` of a checkpoint):

    ``out[r, o] = bias[e, o] + sum over blocks j of
    a_scale[r, j] * b_scale[e, o // 128, j] * (sum over k of block j of a[r, k] * b[e, o, k])``

    for ``expert_offsets[e] <= r < expert_offsets[e+1]``; rows from ``expert_offsets[E]`` on are
    zero. Each block is summed in a separate fp32 accumulator, which is scaled and added to a second
    one. Products are exact on the CPU and in the CUDA kernels for any GPU; the tensor cores of
    sm_90 sum e4m3 products with fewer bits than fp32 within an instruction, and the second
    accumulator keeps this error from growing with K. The order is fixed, so results are bitwise
    identical for every run. The gradient of a is this op applied to rows of the output gradient,
    ``b.transpose(1, 2)`` and ``b_scale.transpose(1, 2)``; the gradient of b is
    :func:`grouped_gemm_fp8_wgrad`. The op itself is not differentiable;
    :func:`moe_ops.layers.fp8_ffn` is.

    Args:
        a: [N, K] float8_e4m3fn rows sorted by expert; any strides. K need not be a multiple of 128.
        a_scale: [N, ceil(K / 128)] float32.
        b: [E, O, K] float8_e4m3fn, out-features before in-features, any strides. Kernels read
            tensors that are dense along K in place; CPU kernels also tensors that are dense along
            O.
        b_scale: [E, ceil(O / 128), ceil(K / 128)] float32.
        expert_offsets: [E+1], int32 or int64, starting at 0, nondecreasing, at most N.
        bias: [E, O] float32, bfloat16 or float16, or None.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [N, O] of out_dtype.

    Raises:
        ValueError: wrong dtype, rank or size; decreasing offsets, or offsets above N (on the CPU).
        NotImplementedError: if a gradient is needed.

    Source:
        DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2.
    """
    return _grouped_gemm_fp8(a, a_scale, b, b_scale, expert_offsets, out_dtype, bias)


def grouped_gemm_fp8_wgrad(
    grad: Tensor,
    grad_scale: Tensor,
    a: Tensor,
    a_scale: Tensor,
    expert_offsets: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Computes the weight gradient of a GEMM of float8_e4m3fn operands (ragged K).

    Both operands are rows of experts quantized by :func:`quantize_fp8_columns`:

    ``out[e, o, k] = sum over the groups g of expert e of
    grad_scale[g, o] * a_scale[g, k] * (sum over the columns c of g of grad[o, c] * a[k, c])``

    where the columns of group g start at 128 g. Sums run in fp32 in a fixed order, with a separate
    accumulator per group as in :func:`grouped_gemm_fp8`, so results are bitwise identical for every
    run. Experts without rows get zeros.

    Args:
        grad: [O, 128 G] float8_e4m3fn, the gradient of the GEMM's output.
        grad_scale: [G, O] float32.
        a: [K, 128 G] float8_e4m3fn, the GEMM's input rows. O and K need not be multiples of 128.
        a_scale: [G, K] float32.
        expert_offsets: [E+1], int32 or int64, see quantize_fp8_columns.
        out_dtype: float32, bfloat16 or float16.
        main_grad: [E, O, K] contiguous, of one of these dtypes: a buffer to which the gradient is
            added, in fp32, whatever out_dtype is; experts without rows are unchanged. None: a new
            tensor is returned.

    Returns:
        [E, O, K] of out_dtype; main_grad if given.

    Raises:
        ValueError: wrong dtype, rank or size; decreasing offsets, or offsets that do not fit G
            groups (on the CPU).
        NotImplementedError: if a gradient is needed.

    Source:
        DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.
    """
    operands = (grad, grad_scale, a, a_scale, expert_offsets)
    if main_grad is not None:
        _accumulate(*operands, main_grad)
        return main_grad
    out: Tensor = _grouped_gemm_fp8_wgrad(*operands, out_dtype)
    return out


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


def _check_wgrad(
    grad: Tensor, grad_scale: Tensor, a: Tensor, a_scale: Tensor, expert_offsets: Tensor
) -> dict[str, int]:
    """Checks the operands and returns the sizes of the result."""
    op = _WGRAD_OP
    for name, q, scale, shape in (
        ("grad", grad, grad_scale, "[O, 128 G]"),
        ("a", a, a_scale, "[K, 128 G]"),
    ):
        check_tensor(op, name, q, (FP8,), shape)
        check_tensor(op, f"{name}_scale", scale, (torch.float32,), "[G, features]")
        check_size(op, f"{name}_scale", scale, 1, q.shape[0], "the features")
        check_size(op, name, q, 1, FP8_BLOCK * scale.shape[0], "128 columns a group")
    check_size(op, "a_scale", a_scale, 0, grad_scale.shape[0], "G")
    check_offsets(op, expert_offsets)
    num_experts = expert_offsets.shape[0] - 1
    check(
        a_scale.shape[0] >= num_experts,
        f"{op}: a_scale must have at least one group for each of the {num_experts} experts, got "
        f"{a_scale.shape[0]}.",
    )
    operands = {"grad_scale": grad_scale, "a": a, "a_scale": a_scale}
    check_same_device(op, grad=grad, **operands, expert_offsets=expert_offsets)
    return {"E": num_experts, "O": grad.shape[0], "K": a.shape[0]}


@register_fake(_WGRAD_OP)
def _(
    grad: Tensor,
    grad_scale: Tensor,
    a: Tensor,
    a_scale: Tensor,
    expert_offsets: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    sizes = _check_wgrad(grad, grad_scale, a, a_scale, expert_offsets)
    check_dtype(_WGRAD_OP, "out_dtype", out_dtype, NARROW_FLOATS)
    return grad.new_empty(tuple(sizes.values()), dtype=out_dtype)


@register_fake(_ACCUMULATE_OP)
def _(
    grad: Tensor,
    grad_scale: Tensor,
    a: Tensor,
    a_scale: Tensor,
    expert_offsets: Tensor,
    main_grad: Tensor,
) -> Tensor:
    sizes = _check_wgrad(grad, grad_scale, a, a_scale, expert_offsets)
    check_tensor(_WGRAD_OP, "main_grad", main_grad, NARROW_FLOATS, "[E, O, K]", **sizes)
    check(
        main_grad.is_contiguous(),
        f"{_WGRAD_OP}: main_grad must be contiguous, got shape {list(main_grad.shape)} with other "
        "strides.",
    )
    check_same_device(_WGRAD_OP, grad=grad, main_grad=main_grad)
    return main_grad.new_empty((0,))


register_no_gradient(_OP, "use moe_ops.layers.fp8_ffn, or dequantize and call grouped_gemm")
register_no_gradient(_WGRAD_OP, "dequantize the operands and call grouped_gemm_wgrad")
register_no_gradient(_ACCUMULATE_OP, "dequantize the operands and call grouped_gemm_wgrad")
# The result dtype is an argument, and operand dtypes must not change.
register_autocast(_OP)
register_autocast(_WGRAD_OP)

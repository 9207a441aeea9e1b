"""quantize_fp8: rows in float8_e4m3fn with one scale per 128 columns; quantize_fp8_columns: the
rows of experts, transposed, with one scale per 128 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_no_gradient
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check,
    check_float,
    check_index,
    check_offsets,
    check_same_device,
    check_size,
    check_tensor,
)
from moe_ops.ops._library import register_fake

_quantize_fp8 = direct_call("quantize_fp8")
_quantize_fp8_columns = direct_call("quantize_fp8_columns")

_OP = "quantize_fp8"
_COLUMNS_OP = "quantize_fp8_columns"
FP8 = torch.float8_e4m3fn
FP8_BLOCK = 128


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes rows to float8_e4m3fn, with one scale per 128 columns.

    ``scale = amax / 448``, where amax is the block's largest magnitude, and q is ``x * (448 /
    amax)`` rounded to the nearest e4m3 value, ties to even; both in fp32. The error of a value is
    at most 1/16 of it, or 2^-10 * scale near zero, whichever is larger. Results are bitwise
    identical on all devices.

    - A block of zeros gets q = 0 and the scale 2^-126; amax is clamped to at least 448 * 2^-126.
    - A block with an infinity or a NaN gets the scale NaN and q = NaN, so every result of it is
      NaN; other blocks are unaffected.

    Args:
        x: [N, D]; float32, bfloat16 or float16, any strides. D need not be a multiple of 128.

    Returns:
        q: float8_e4m3fn [N, D].
        scale: float32 [N, ceil(D / 128)]; x is about ``q * scale``.

    Raises:
        ValueError: wrong dtype or rank.
        NotImplementedError: if a gradient is needed.

    Source:
        1 x 128 tiles of activations: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2.
    """
    q, scale = _quantize_fp8(x)
    return q, scale


def quantize_fp8_columns(
    x: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantizes the rows of experts to float8_e4m3fn, with one scale per 128 rows of a column, as
    operands of :func:`grouped_gemm_fp8_wgrad`, which sums over rows.

    The rows of expert e are divided into groups of 128, beginning with its first row; the last
    group may be shorter. A group is quantized column by column, like 128 values of a row in
    :func:`quantize_fp8`, and stored transposed. The groups of expert e begin at ``expert_offsets[e]
    // 128 + e``, so that experts share no groups. Columns of q without a row, and groups without an
    expert, have the values of quantized zeros. Results are bitwise identical on all devices.

    Args:
        x: [N, D] rows sorted by expert; float32, bfloat16 or float16, any strides. With
            `row_to_slot`, tokens [T, D].
        expert_offsets: [E+1], int32 or int64, starting at 0, nondecreasing, at most N.
        row_to_slot: [N], int32 or int64, N = T * K: row r is row ``row_to_slot[r] // K`` of x, as
            in :func:`permute`, without a copy of the rows. None: x contains the rows.
        topk_weights: [T, K] in any float dtype, with `row_to_slot` only: row r is multiplied by the
            weight of its slot, in fp32, before quantization.

    Returns:
        q: float8_e4m3fn [D, 128 G] with G = N // 128 + E; row r of expert e is column
            ``128 * (expert_offsets[e] // 128 + e) + r - expert_offsets[e]``.
        scale: float32 [G, D].

    Raises:
        ValueError: wrong dtype, rank or size; decreasing offsets, offsets above N, or slots outside
            [0, N) (on the CPU).
        NotImplementedError: if a gradient is needed.

    Source:
        128 x 1 tiles in the backward pass: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.
    """
    q, scale = _quantize_fp8_columns(x, expert_offsets, row_to_slot, topk_weights)
    return q, scale


def fp8_groups(num_rows: int, num_experts: int) -> int:
    """Returns G of quantize_fp8_columns."""
    return num_rows // FP8_BLOCK + num_experts


def fp8_blocks(n: int) -> int:
    return (n + FP8_BLOCK - 1) // FP8_BLOCK


@register_fake(_OP)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor(_OP, "x", x, NARROW_FLOATS, "[N, D]")
    scale = x.new_empty((x.shape[0], fp8_blocks(x.shape[1])), dtype=torch.float32)
    return x.new_empty(tuple(x.shape), dtype=FP8), scale


@register_fake(_COLUMNS_OP)
def _(
    x: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor | None,
    topk_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    op = _COLUMNS_OP
    check_tensor(op, "x", x, NARROW_FLOATS, "[T, D]" if row_to_slot is not None else "[N, D]")
    check_offsets(op, expert_offsets)
    num_tokens, width = x.shape
    num_rows = num_tokens
    if row_to_slot is not None:
        check_index(op, "row_to_slot", row_to_slot, "[N]")
        num_rows = row_to_slot.shape[0]
        check(
            num_rows == 0 if num_tokens == 0 else num_rows % num_tokens == 0,
            f"{op}: row_to_slot must hold a whole number of slots for each of the {num_tokens} "
            f"tokens of x, got {num_rows}.",
        )
    if topk_weights is not None:
        check(
            row_to_slot is not None,
            f"{op}: topk_weights must come with row_to_slot, got it alone.",
        )
        check_float(op, "topk_weights", topk_weights, "[T, K]", T=num_tokens)
        if num_tokens > 0:
            check_size(op, "topk_weights", topk_weights, 1, num_rows // num_tokens, "K")
    check_same_device(
        op, x=x, expert_offsets=expert_offsets, row_to_slot=row_to_slot, topk_weights=topk_weights
    )
    groups = fp8_groups(num_rows, expert_offsets.shape[0] - 1)
    scale = x.new_empty((groups, width), dtype=torch.float32)
    return x.new_empty((width, groups * FP8_BLOCK), dtype=FP8), scale


for _name in (_OP, _COLUMNS_OP):
    register_no_gradient(_name, "on x.detach()")
    register_autocast(_name)

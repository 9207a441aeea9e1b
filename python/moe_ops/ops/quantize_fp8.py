"""quantize_fp8: rows as float8_e4m3fn with a scale for every 128 columns; quantize_fp8_columns: the
rows of experts, transposed, with a scale for every 128 rows."""

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
    """Rounds rows to float8_e4m3fn, 128 columns to a scale.

    ``scale = amax / 448`` of the block's largest magnitude, and each code is the number of e4m3
    nearest to ``x * (448 / amax)``, ties to even; both in fp32. A code is off by at most 1/16 of
    what it stands for, or 2^-10 * scale near zero, whichever is more. The same bits on every
    device.

    - A block of zeros gets codes 0 and the scale 2^-126; amax counts as at least 448 * 2^-126.
    - A block that holds an infinity or a NaN gets the scale NaN and codes NaN: whatever is computed
      with it is NaN, and other blocks do not notice.

    Args:
        x: [N, D]; float32, bfloat16 or float16, any strides. D need not be a multiple of 128.

    Returns:
        q: float8_e4m3fn [N, D].
        scale: float32 [N, ceil(D / 128)]; x is about ``q * scale``.

    Raises:
        ValueError: wrong dtype or rank.
        NotImplementedError: where a gradient is wanted.

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
    """Rounds the rows of experts to float8_e4m3fn, 128 rows of a column to a scale: an operand of
    :func:`grouped_gemm_fp8_wgrad`, whose sum runs over rows.

    The rows of expert e are cut into groups of 128 from its first row on; the last one may be
    shorter. A group is quantized column by column as :func:`quantize_fp8` does with 128 numbers of
    a row, and lies transposed. Expert e has its groups from ``expert_offsets[e] // 128 + e`` on, so
    that no two experts share one. Columns of codes that no row fills, and groups of no expert, are
    those of zeros. The same bits on every device.

    Args:
        x: [N, D] rows sorted by expert; float32, bfloat16 or float16, any strides. With
            `row_to_slot`, tokens [T, D].
        expert_offsets: [E+1], int32 or int64, from 0, never falling, at most N.
        row_to_slot: [N], int32 or int64, N = T * K: row r is row ``row_to_slot[r] // K`` of x, as
            :func:`permute` gathers it, without a copy of the rows. None: x holds the rows.
        topk_weights: [T, K] in any float dtype, with `row_to_slot` only: row r is multiplied by the
            weight of its slot, in fp32, before it is rounded.

    Returns:
        q: float8_e4m3fn [D, 128 G] with G = N // 128 + E; row r of expert e is column
            ``128 * (expert_offsets[e] // 128 + e) + r - expert_offsets[e]``.
        scale: float32 [G, D].

    Raises:
        ValueError: wrong dtype, rank or size; offsets that fall or end past N, or slots outside
            [0, N) (on the CPU).
        NotImplementedError: where a gradient is wanted.

    Source:
        128 x 1 tiles in the backward pass: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.
    """
    q, scale = _quantize_fp8_columns(x, expert_offsets, row_to_slot, topk_weights)
    return q, scale


def fp8_groups(num_rows: int, num_experts: int) -> int:
    """G of quantize_fp8_columns."""
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

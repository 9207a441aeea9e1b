"""unpermute: the weighted sum of a token's rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_autograd, save_inputs
from moe_ops.ops._checks import (
    accumulate_dtype,
    check_float,
    check_index,
    check_like,
    check_same_device,
    new_if,
    new_like,
)
from moe_ops.ops._library import register_fake

_unpermute = direct_call("unpermute")


def unpermute(
    rows: Tensor, expert_offsets: Tensor, slot_to_row: Tensor, topk_weights: Tensor | None = None
) -> Tensor:
    """Sums a token's rows with its routing weights.

    ``y[t] = sum_k topk_weights[t, k] * rows[slot_to_row[t, k]]`` over the slots whose row is before
    ``expert_offsets[E]``; other slots, and those with row -1, add nothing, even if their weight is
    NaN. The sum runs in slot order in fp32 (fp64 for fp64). Differentiable any number of times: the
    gradient of a row is the sum over its slots, in slot order, and zero for a row without slots.

    Args:
        rows: [N, H], any number of them; float64, float32, bfloat16 or float16, any strides.
        expert_offsets: [E+1], int32 or int64 (from :func:`sort_by_expert`, or the ``rank_offsets``
            of :func:`dispatch_layout`).
        slot_to_row: [T, K], int32 or int64, values in [-1, N), repeated or not.
        topk_weights: [T, K] in any float dtype, used in fp32; None means ones.

    Returns:
        [T, H] in the dtype of rows. A token without experts gets zeros.

    Raises:
        ValueError: wrong dtype, rank or size; a map or offset out of range.
    """
    return _unpermute(rows, expert_offsets, slot_to_row, topk_weights)


def _check(
    op: str,
    rows: Tensor,
    expert_offsets: Tensor,
    slot_to_row: Tensor,
    topk_weights: Tensor | None,
) -> None:
    check_float(op, "rows", rows, "[N, H]")
    check_index(op, "expert_offsets", expert_offsets, "[E+1]")
    check_index(op, "slot_to_row", slot_to_row, "[T, K]")
    num_tokens, top_k = slot_to_row.shape
    check_float(op, "topk_weights", topk_weights, "[T, K]", T=num_tokens, K=top_k)
    check_same_device(
        op,
        rows=rows,
        expert_offsets=expert_offsets,
        slot_to_row=slot_to_row,
        topk_weights=topk_weights,
    )


@register_fake("unpermute")
def _(*args: Any) -> Tensor:
    _check("unpermute", *args)
    rows, _, slot_to_row, _ = args
    return rows.new_empty((slot_to_row.shape[0], rows.shape[1]))


@register_fake("unpermute_bwd")
def _(grad_y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    op = "unpermute_bwd"
    _check(op, *args)
    rows, _, slot_to_row, topk_weights = args
    check_like(op, "grad_y", grad_y, "rows", rows, "[T, H]")
    check_same_device(op, rows=rows, grad_y=grad_y)
    weighted, acc = topk_weights is not None, accumulate_dtype(rows.dtype)
    return new_like(rows), new_if(weighted, rows, slot_to_row.shape, acc)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, *maps, weights = inputs
    if weights is None:  # Backward needs no values of the rows, only their shape.
        rows = rows.new_empty((1, rows.shape[1])).expand(rows.shape)
    ctx.save_for_backward(rows, *maps, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, expert_offsets, slot_to_row, weights = ctx.saved_tensors
    grad_rows, grad_weights = torch.ops.moe_ops.unpermute_bwd(
        grad, rows, expert_offsets, slot_to_row, weights
    )
    return grad_rows, None, None, None if weights is None else grad_weights.to(weights.dtype)


def _backward_bwd(ctx: Any, gg_rows: Tensor | None, gg_weights: Tensor | None) -> tuple[Any, ...]:
    """Computes derivatives of unpermute_bwd: both outputs are bilinear, so the derivatives are the
    same two ops."""
    grad_y, rows, offsets, slot_to_row, weights = ctx.saved_tensors
    ops = torch.ops.moe_ops
    d_grad_y = d_rows = d_weights = None
    if gg_rows is not None:
        d_grad_y = ops.unpermute(gg_rows, offsets, slot_to_row, weights)
    if weights is not None:
        if gg_rows is not None:
            d_weights = ops.unpermute_bwd(grad_y, gg_rows, offsets, slot_to_row, weights)[1]
            d_weights = d_weights.to(weights.dtype)
        if gg_weights is not None:
            through = ops.unpermute(rows, offsets, slot_to_row, gg_weights)
            d_grad_y = through if d_grad_y is None else d_grad_y + through
            d_rows = ops.unpermute_bwd(grad_y, rows, offsets, slot_to_row, gg_weights)[0]
    return d_grad_y, d_rows, None, None, d_weights


register_autograd("unpermute", _backward, _setup)
register_autograd("unpermute_bwd", _backward_bwd, save_inputs)
register_autocast("unpermute")

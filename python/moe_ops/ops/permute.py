"""permute: copies token rows into expert order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_autograd
from moe_ops.ops._checks import check, check_float, check_index, check_same_device
from moe_ops.ops._library import register_fake

_permute = direct_call("permute")


def permute(
    x: Tensor, expert_offsets: Tensor, row_to_slot: Tensor, *, top_k: int | None = None
) -> Tensor:
    """Copies each token's row once for each of its slots, in expert order.

    ``rows[r] = x[row_to_slot[r] // K]`` for ``r < expert_offsets[E]``; later rows (empty slots) are
    zero, and so are rows whose slot is -1. Differentiable any number of times: the gradient of x is
    the sum of a token's rows, in slot order and in fp32 (fp64 for fp64).

    Args:
        x: [T, H]; float64, float32, bfloat16 or float16, any strides.
        expert_offsets: [E+1], int32 or int64, starting at 0, nondecreasing (from
            :func:`sort_by_expert`, or the ``rank_offsets`` of :func:`dispatch_layout`).
        row_to_slot: [N], int32 or int64, values in [-1, T*K), repeated or not; with K = 1, slots
            are tokens.
        top_k: K; N may then be any number of rows. None: N / T, one row per slot.

    Returns:
        [N, H] in x's dtype. T = 0 gives N rows of zeros.

    Raises:
        ValueError: wrong dtype, rank or size; N not a multiple of T without top_k; a map or offset
            out of range.
    """
    return _permute(x, expert_offsets, row_to_slot, top_k)


def _check(
    op: str,
    name: str,
    x: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor,
    top_k: int | None,
) -> None:
    check(top_k is None or top_k >= 1, f"{op}: top_k must be at least 1, got {top_k}.")
    check_float(op, name, x, "[T, H]" if name == "x" else "[N, H]")
    check_index(op, "expert_offsets", expert_offsets, "[E+1]")
    check_index(op, "row_to_slot", row_to_slot, "[N]")
    check_same_device(op, **{name: x}, expert_offsets=expert_offsets, row_to_slot=row_to_slot)


@register_fake("permute")
def _(x: Tensor, expert_offsets: Tensor, row_to_slot: Tensor, top_k: int | None) -> Tensor:
    _check("permute", "x", x, expert_offsets, row_to_slot, top_k)
    return x.new_empty((row_to_slot.shape[0], x.shape[1]))


@register_fake("permute_bwd")
def _(
    grad_rows: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor,
    num_tokens: int,
    top_k: int | None,
) -> Tensor:
    _check("permute_bwd", "grad_rows", grad_rows, expert_offsets, row_to_slot, top_k)
    check(num_tokens >= 0, f"permute_bwd: num_tokens must not be negative, got {num_tokens}.")
    return grad_rows.new_empty((num_tokens, grad_rows.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, expert_offsets, row_to_slot, ctx.top_k = inputs
    ctx.save_for_backward(expert_offsets, row_to_slot)
    ctx.num_tokens = x.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    expert_offsets, row_to_slot = ctx.saved_tensors
    grad_x = torch.ops.moe_ops.permute_bwd(
        grad, expert_offsets, row_to_slot, ctx.num_tokens, ctx.top_k
    )
    return grad_x, None, None, None


def _setup_bwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, expert_offsets, row_to_slot, _, ctx.top_k = inputs
    ctx.save_for_backward(expert_offsets, row_to_slot)


def _backward_bwd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    expert_offsets, row_to_slot = ctx.saved_tensors
    grad_rows = torch.ops.moe_ops.permute(grad, expert_offsets, row_to_slot, ctx.top_k)
    return grad_rows, None, None, None, None


register_autograd("permute", _backward, _setup)
register_autograd("permute_bwd", _backward_bwd, _setup_bwd)
register_autocast("permute")

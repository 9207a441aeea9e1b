"""all_experts_ffn: every expert's small two-layer MLP on every token."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.formulas.activations import plain_act, plain_act_gradient
from moe_ops.formulas.dtypes import accumulate_dtype
from moe_ops.formulas.invariant import batched_products
from moe_ops.numerics import is_batch_invariant_enabled


def forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Returns y [T, E, O] and the pre-activation [E, T, I], for `backward`."""
    preact = _products(_inputs(x, input_ids)[0], w_up, b_up).to(accumulate_dtype(x.dtype))
    y = _products(_act(preact, activation, x.dtype), w_down, b_down)
    return y.transpose(0, 1).contiguous(), preact


def backward(
    grad_y: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    preact: Tensor,
    activation: str,
    need_x: bool,
    need_w_up: bool,
    need_w_down: bool,
    need_b_up: bool,
    need_b_down: bool,
) -> list[Tensor | None]:
    """Returns the gradients of x, w_up, w_down, b_up and b_down."""
    dtype, acc = x.dtype, accumulate_dtype(x.dtype)
    inputs, ids = _inputs(x, input_ids)
    grad = grad_y.transpose(0, 1)
    grads: list[Tensor | None] = [None] * 5
    if need_w_down:
        grads[2] = torch.bmm(grad.transpose(1, 2), _act(preact, activation, dtype))
    if need_b_down:
        grads[4] = grad.sum(1, dtype=acc).to(dtype)
    if need_x or need_w_up or need_b_up:
        u = plain_act_gradient(torch.bmm(grad, w_down).to(acc), preact, activation)
        narrow = u.to(dtype)
        if need_w_up:
            grads[1] = torch.bmm(narrow.transpose(1, 2), inputs)
        if need_b_up:
            grads[3] = u.sum(1).to(dtype)
        if need_x:
            # Experts with one input are summed in order, which index_add does not guarantee.
            by_input = torch.zeros((x.shape[1], x.shape[0], x.shape[2]), dtype=acc, device=x.device)
            by_input.index_put_((ids,), torch.bmm(narrow, w_up).to(acc), accumulate=True)
            grads[0] = by_input.to(dtype).transpose(0, 1).contiguous()
    return grads


def _inputs(x: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the input of each expert [E, T, H], and its index."""
    ids = input_ids.long().clamp(0, max(x.shape[1] - 1, 0))
    return x.transpose(0, 1).index_select(0, ids), ids


def _products(a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies [E, T, D] by [E, O, D] to [E, T, O]."""
    if is_batch_invariant_enabled():
        return batched_products(a, w, bias)
    if bias is None:
        return torch.bmm(a, w.transpose(1, 2))
    return torch.baddbmm(bias[:, None], a, w.transpose(1, 2))


def _act(preact: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    h = preact if activation == "none" else plain_act(preact, activation)
    return h.to(dtype)

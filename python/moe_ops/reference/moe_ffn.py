from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import acc_dtype
from .gated_act import GATED, gated_act, plain_act
from .grouped_gemm import grouped_gemm
from .permute import permute
from .sort_by_expert import sort_by_expert
from .unpermute import unpermute


def moe_ffn(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    main_grads: tuple[Tensor | None, Tensor | None] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes y[t] = sum_k weight[t, k] * (W_down act(W_gate_up x[t] + b_gate_up) + b_down), [T,
    H].

    With `apply_router_weight_on_input` the weight multiplies x[t] instead (Llama 4). Intermediate
    results are not rounded: half-precision dtypes are widened once at the start. Backward adds the
    gradients of w_gate_up and w_down to the buffers in `main_grads`, if given, instead of returning
    them.
    """
    acc = acc_dtype(x.dtype)
    expert_offsets, row_to_slot, slot_to_row = sort_by_expert(topk_ids, w_gate_up.shape[0])
    weights = topk_weights.to(acc)

    rows = permute(x.to(acc), expert_offsets, row_to_slot)
    if apply_router_weight_on_input:
        row_weights = weights.reshape(-1)[row_to_slot.long()].clone()
        row_weights[int(expert_offsets[-1]) :] = 0
        rows = rows * row_weights[:, None]
    up_grad, down_grad = main_grads or (None, None)
    w_gate_up = _gradient_into(w_gate_up.to(acc), up_grad)
    w_down = _gradient_into(w_down.to(acc), down_grad)
    preact = grouped_gemm(rows, w_gate_up, expert_offsets, bias=_to(b_gate_up, acc))
    if activation in GATED:
        h = gated_act(preact, activation, interleaved=interleaved, alpha=alpha, limit=limit)
    else:
        h = plain_act(preact, activation)
    out = grouped_gemm(h, w_down, expert_offsets, bias=_to(b_down, acc))
    y = unpermute(
        out, expert_offsets, slot_to_row, None if apply_router_weight_on_input else weights
    )
    return y.to(out_dtype or x.dtype)


def _to(t: Tensor | None, dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


class _GradientInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.buffer.copy_(ctx.buffer.to(grad.dtype) + grad)
        return None, None


def _gradient_into(w: Tensor, buffer: Tensor | None) -> Tensor:
    return w if buffer is None else _GradientInto.apply(w, buffer)

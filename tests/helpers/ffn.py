"""Operands and bounds of moe_ffn and of its activations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from tests.helpers.routing import Routing
from torch import Tensor

from moe_ops import ops, reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.testing import Kwargs, acc_dtype, check_against_reference


def activation_magnitude(preact: Tensor, activation: str, interleaved: bool = False) -> Tensor:
    """A bound of the activation on non-negative `preact`; its derivative bounds the derivative.

    g + g^2 bounds |act(g)| with room for |act'| <= 1.13 and the curvature that turns an error in
    the pre-activation into an error of the derivative. The polynomial inside gelu_tanh is cubic.
    """
    if activation in PLAIN_ACTIVATIONS:
        gate, up = preact, None
    elif interleaved:
        gate, up = preact[..., 0::2], preact[..., 1::2]
    else:
        gate, up = preact.chunk(2, dim=-1)
    if activation in ("reglu", "relu"):
        act = gate
    elif activation == "relu2":
        act = gate * gate
    elif activation in ("geglu_tanh", "gelu_tanh"):
        act = 2 * gate + gate**2 + gate**4 / 4
    else:
        act = 2 * gate + gate**2
    if up is None:
        return act
    return act * (up + 1 if activation == "swiglu_oai" else up)


def gated_act_magnitude(
    gate_up: Tensor, activation: str = "swiglu", *, interleaved: bool = False, **_: Any
) -> Tensor:
    return activation_magnitude(gate_up, activation, interleaved)


def moe_ffn_magnitude(
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
    **_: Any,
) -> Tensor:
    """moe_ffn on non-negative operands with the activation replaced by its bound."""
    offsets, row_to_slot, slot_to_row = reference.sort_by_expert(topk_ids, w_gate_up.shape[0])
    rows = reference.permute(x, offsets, row_to_slot)
    if apply_router_weight_on_input:
        rows = rows * topk_weights.reshape(-1)[row_to_slot.long()][:, None]
    preact = reference.grouped_gemm(rows, w_gate_up, offsets, bias=b_gate_up)
    h = activation_magnitude(preact, activation, interleaved)
    out = reference.grouped_gemm(h, w_down, offsets, bias=b_down)
    weights = None if apply_router_weight_on_input else topk_weights
    return reference.unpermute(out, offsets, slot_to_row, weights)


def ffn_operands(
    routing: Routing,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    *,
    activation: str = "swiglu",
    bias: bool = False,
    weights_dtype: torch.dtype | None = None,
) -> Kwargs:
    """The tensors of a moe_ffn call, scaled so that every stage has values near one."""
    e = routing.num_experts
    width = intermediate_size * (2 if activation in GATED_ACTIVATIONS else 1)
    if weights_dtype is None:
        weights_dtype = acc_dtype(dtype)
    kwargs: Kwargs = {
        "x": torch.randn(routing.num_tokens, hidden_size).to(dtype),
        "w_gate_up": (torch.randn(e, width, hidden_size) / hidden_size**0.5).to(dtype),
        "w_down": (torch.randn(e, hidden_size, intermediate_size) / intermediate_size**0.5).to(
            dtype
        ),
        "topk_weights": torch.rand(routing.num_tokens, routing.top_k).to(weights_dtype) + 0.1,
        "topk_ids": routing.ids(),
        "activation": activation,
    }
    if bias:
        kwargs["b_gate_up"] = torch.randn(e, width).to(dtype)
        kwargs["b_down"] = torch.randn(e, hidden_size).to(dtype)
    return kwargs


def stored(call: Kwargs, names: Sequence[str] = ("w_gate_up", "w_down")) -> Kwargs:
    """The call with these weights as views of contiguous tensors [E, H, 2I] and [E, I, H]: gpt-oss
    and Llama 4 store both so, DBRX w_down."""
    return {**call, **{name: call[name].mT.contiguous().mT for name in names}}


FFN_FLOATS = ("x", "w_gate_up", "w_down", "topk_weights", "b_gate_up", "b_down")


def differentiable(call: Kwargs) -> list[str]:
    """The operands of a moe_ffn call that have gradients."""
    return [name for name in FFN_FLOATS if call.get(name) is not None]


def check_moe_ffn(
    call: Kwargs,
    wrt: Sequence[str] | None = None,
    *,
    grad_view: str = "contiguous",
    out_dtype: torch.dtype | None = None,
) -> None:
    """moe_ffn against its reference, with gradients by all operands unless `wrt` names some. Half
    types may round the pre-activation, the activation and an expert's output, and in backward the
    gradients of the three, and that of an output in out_dtype: that is what `steps` allows."""
    sizes = (*call["x"].shape, call["w_down"].shape[-1], call["topk_ids"].numel(), 1)
    check_against_reference(
        functools.partial(ops.moe_ffn, out_dtype=out_dtype),
        reference.moe_ffn,
        call,
        differentiable(call) if wrt is None else wrt,
        magnitude=moe_ffn_magnitude,
        sum_length=max(sizes),
        steps=2,
        grad_steps=5 if out_dtype is None else 6,
        grad_view=grad_view,
        out_dtype=out_dtype,
    )

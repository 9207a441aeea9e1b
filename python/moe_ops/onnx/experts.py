"""Activations and complete expert networks in ONNX.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

from onnxscript import opset18 as op

from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.weight_formats import split_formats

from .products import Weights, combined, experts_of, product, quantized_experts_of
from .routing import sorted_slots
from .values import (
    Value,
    columns,
    halves,
    int_scalar,
    like,
    long,
    number,
    reshape,
    size,
    sum_of,
    unsqueeze,
    wide,
)

_END = 2**62  # Past the end of every dimension.


def _silu(v: Value) -> Value:
    return op.Mul(v, op.Sigmoid(v))


def _gelu(v: Value) -> Value:
    erf = op.Erf(op.Mul(v, number(math.sqrt(0.5))))
    return op.Mul(op.Mul(v, number(0.5)), op.Add(erf, number(1)))


def _gelu_tanh(v: Value) -> Value:
    cubic = op.Mul(op.Mul(op.Mul(v, v), v), number(0.044715))
    tanh = op.Tanh(op.Mul(op.Add(v, cubic), number(math.sqrt(2 / math.pi))))
    return op.Mul(op.Mul(v, number(0.5)), op.Add(tanh, number(1)))


def _relu2(v: Value) -> Value:
    return op.Mul(op.Relu(v), op.Relu(v))


_PLAIN = {
    "none": lambda v: v,
    "sigmoid": op.Sigmoid,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": op.Relu,
    "relu2": _relu2,
}
_GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def _activated(
    preact: Value,
    activation: str,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Value:
    """Computes [..., I] from [..., 2I] or [..., I], in float32."""
    if activation not in GATED_ACTIVATIONS:
        return _PLAIN[activation](preact)
    if interleaved:
        gate, up = (columns(preact, first, _END, 2) for first in (0, 1))
    else:
        gate, up = halves(preact)
    if activation in ("swiglu_oai", "swiglu_clamped"):
        gate = op.Min(gate, number(limit))
        up = op.Clip(up, number(-limit), number(limit))
        if activation == "swiglu_clamped":
            return op.Mul(up, _PLAIN["silu"](gate))
        return op.Mul(op.Add(up, number(1)), op.Mul(gate, op.Sigmoid(op.Mul(gate, number(alpha)))))
    return op.Mul(_PLAIN[_GATES[activation]](gate), up)


def gated_act(
    gate_up: Value,
    activation: str = "swiglu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Value:
    return like(_activated(wide(gate_up), activation, interleaved, alpha, limit), gate_up)


def moe_ffn(
    x: Value,
    w_gate_up: Value,
    w_down: Value,
    topk_weights: Value,
    topk_ids: Value,
    b_gate_up: Value | None = None,
    b_down: Value | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    out_dtype: Any = None,
) -> Value:
    act = (activation, interleaved, alpha, limit)
    up, down = experts_of(w_gate_up, b_gate_up), experts_of(w_down, b_down)
    widths = size(w_gate_up, 1), size(w_down, 1)
    routing = topk_weights, topk_ids
    y = _ffn(wide(x), up, down, widths, routing, act, apply_router_weight_on_input)
    return like(y, x, out_dtype)


def moe_ffn_quantized(
    x: Value,
    w_gate_up: Value,
    w_gate_up_scale: Value,
    w_down: Value,
    w_down_scale: Value,
    topk_weights: Value,
    topk_ids: Value,
    format: str,
    x_scale: Value | None = None,
    b_gate_up: Value | None = None,
    b_down: Value | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    w_gate_up_zero: Value | None = None,
    w_down_zero: Value | None = None,
) -> Value:
    names = split_formats(format, 2) or ()
    up = quantized_experts_of(w_gate_up, w_gate_up_scale, w_gate_up_zero, b_gate_up, names[0])
    down = quantized_experts_of(w_down, w_down_scale, w_down_zero, b_down, names[1])
    tokens = wide(x) if x_scale is None else op.Mul(wide(x), wide(x_scale))
    act = (activation, interleaved, alpha, limit)
    widths = size(w_gate_up, 1), size(w_down, 1)
    routing = topk_weights, topk_ids
    return like(_ffn(tokens, up, down, widths, routing, act, apply_router_weight_on_input), x)


def _ffn(
    x: Value,
    up: Weights,
    down: Weights,
    widths: tuple[int, int],
    routing: tuple[Value, Value],
    act: tuple[str, bool, float, float],
    on_input: bool,
) -> Value:
    """Computes moe_ffn of tokens in float32."""
    weights, ids = wide(routing[0]), routing[1]
    offsets, row_to_slot, slot_to_row = sorted_slots(ids, len(up))
    rows = op.Gather(x, op.Div(row_to_slot, int_scalar(size(ids, 1))), axis=0)
    if on_input:
        row_weights = op.Gather(reshape(weights, -1), row_to_slot, axis=0)
        rows = op.Mul(rows, unsqueeze(row_weights, 1))
    h = _activated(product(rows, up, offsets, widths[0]), *act)
    made = product(h, down, offsets, widths[1])
    return combined(made, offsets, slot_to_row, None if on_input else weights)


def peer_ffn(
    x: Value,
    w_gate_up: Value,
    w_down: Value,
    topk_weights: Value,
    topk_ids: Value,
    activation: str = "gelu",
    sparse_grad: bool = False,
) -> Value:
    ids = long(topk_ids)
    num_experts = int_scalar(size(w_gate_up, 0))
    here = op.And(op.GreaterOrEqual(ids, int_scalar(0)), op.Less(ids, num_experts))
    ids = op.Where(here, ids, int_scalar(0))
    keys = op.Gather(wide(w_gate_up), ids, axis=0)  # [T, K, 1 or 2, H]
    tokens = unsqueeze(wide(x), 1, 3)  # [T, 1, H, 1]
    preact = op.Squeeze(op.MatMul(keys, tokens), op.Constant(value_ints=[3]))
    h = _activated(preact, activation)  # [T, K, 1]
    factors = op.Mul(h, unsqueeze(wide(topk_weights), -1))
    factors = op.Where(unsqueeze(here, -1), factors, number(0))
    values = op.Gather(reshape(wide(w_down), 0, -1), ids, axis=0)  # [T, K, H]
    return like(sum_of(op.Mul(factors, values), 1), x)


def all_experts_ffn(
    x: Value,
    w_up: Value,
    w_down: Value,
    input_ids: Value,
    b_up: Value | None = None,
    b_down: Value | None = None,
    activation: str = "relu",
) -> Value:
    inputs = op.Gather(wide(x), long(input_ids), axis=1)  # [T, E, H]
    h = _each(inputs, w_up, b_up)
    return like(_each(_PLAIN[activation](h), w_down, b_down), x)


def _each(x: Value, w: Value, bias: Value | None) -> Value:
    """Multiplies each expert's matrix [O, K] with its input, x [T, E, K] to [T, E, O]."""
    rows = op.Transpose(x, perm=[1, 0, 2])
    y = op.Transpose(op.MatMul(rows, op.Transpose(wide(w), perm=[0, 2, 1])), perm=[1, 0, 2])
    return y if bias is None else op.Add(y, wide(bias))


def mix_expert_outputs(
    outputs: Value,
    weights: Value,
    factor: Value | None = None,
    norm_weight: Value | None = None,
    norm_bias: Value | None = None,
    mean: Value | None = None,
    var: Value | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> tuple[Value, Value, Value]:
    if factor is not None or (norm_weight is not None and mean is None):
        raise ValueError(
            "mix_expert_outputs: an ONNX export must be of a model in eval mode without a factor "
            "per block of tokens, got one."
        )
    n = wide(outputs)
    if norm_weight is not None:
        scale = op.Div(wide(norm_weight), op.Sqrt(op.Add(wide(var), number(eps))))
        n = op.Add(op.Mul(op.Sub(n, wide(mean)), scale), wide(norm_bias))
    y = op.MatMul(wide(weights), _PLAIN[activation](n))
    # There are no batch statistics.
    nothing = op.Constant(value_floats=[])
    return like(y, outputs), nothing, nothing

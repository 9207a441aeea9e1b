"""Permutation of rows and grouped GEMMs in ONNX.

Letters: T tokens, H hidden size, O output size, E experts, K experts per token, N = T * K slots.
"""

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op

from moe_ops.weight_formats import WeightFormat

from .routing import sorted_slots
from .values import (
    INT8,
    UINT8,
    Value,
    arange,
    byte,
    int_scalar,
    ints,
    length,
    like,
    long,
    number,
    reshape,
    size,
    sum_of,
    unsqueeze,
    wide,
)

Weights = list[tuple[Value, Any]]  # For each expert: weight [O, K] and bias [O] or None.


def grouped_gemm(a: Value, b: Value, expert_offsets: Value, bias: Value | None = None) -> Value:
    weights = experts_of(b, bias)
    return like(product(wide(a), weights, long(expert_offsets), size(b, 1)), a)


def grouped_gemm_quantized(
    a: Value,
    b: Value,
    b_scale: Value,
    expert_offsets: Value,
    format: str,
    bias: Value | None = None,
    b_zero: Value | None = None,
) -> Value:
    weights = quantized_experts_of(b, b_scale, b_zero, bias, format)
    return like(product(wide(a), weights, long(expert_offsets), size(b, 1)), a)


def pick(bank: Value, expert: int) -> Value:
    """Selects one expert's tensor from [E, ...]."""
    return op.Gather(bank, int_scalar(expert), axis=0)


def experts_of(w: Value, bias: Value | None) -> Weights:
    """Returns weight [O, K] and bias [O] of each expert, in float32."""
    weights = [wide(pick(w, e), w.dtype) for e in range(size(w, 0))]
    return _with_bias(weights, bias)


def quantized_experts_of(
    w: Value, scale: Value, zero: Value | None, bias: Value | None, format: str
) -> Weights:
    """Returns the weights and biases of quantized experts in int8 or int4, in float32."""
    return _with_bias([dequantized(e, w, scale, zero, format) for e in range(size(w, 0))], bias)


def _with_bias(weights: list[Value], bias: Value | None) -> Weights:
    wide_bias = None if bias is None else wide(bias)
    return [(w, None if wide_bias is None else pick(wide_bias, e)) for e, w in enumerate(weights)]


def product(rows: Value, weights: Weights, offsets: Value, out: int) -> Value:
    """Multiplies the rows [N, K] of expert e with its transposed weight and adds its bias: [N, O];
    rows after the last expert's are zero. All in float32, offsets [E+1] in int64."""
    bounds = [op.Gather(offsets, ints(e), axis=0) for e in range(len(weights) + 1)]
    parts = []
    for e, (weight, bias) in enumerate(weights):
        part = op.Slice(rows, bounds[e], bounds[e + 1], ints(0))
        parts.append(op.Gemm(part, weight, bias, transB=1))
    tail = op.Sub(reshape(length(rows), 1), bounds[-1])
    parts.append(op.Expand(number(0), op.Concat(tail, ints(out), axis=0)))
    return op.Concat(*parts, axis=0)


def dequantized(expert: int, w: Value, scale: Value, zero: Value | None, format: str) -> Value:
    """Returns the weight [O, D] of an expert in int8 or int4, see moe_ops.formulas.codes."""
    how = WeightFormat.from_label(format)
    if how.name not in ("int8", "int4"):
        raise ValueError(
            "moe_ffn_quantized: weights of an ONNX export must be of the formats int8 or int4, got "
            f"{format}."
        )
    codes, factors = pick(w, expert), wide(pick(scale, expert), scale.dtype)
    if how.name == "int8":
        numbers = wide(codes, INT8)
        if how.group_size is None:
            return op.Mul(numbers, unsqueeze(factors, 1))
    else:
        low = op.BitwiseAnd(codes, byte(15))
        high = op.BitShift(codes, byte(4), direction="RIGHT")
        numbers = wide(op.Concat(unsqueeze(low, -1), unsqueeze(high, -1), axis=-1), UINT8)
        if zero is None:
            numbers = op.Sub(numbers, number(8))
    groups = reshape(numbers, size(w, 1), size(scale, 2), -1)
    if zero is not None:
        groups = op.Sub(groups, unsqueeze(wide(pick(zero, expert), zero.dtype), -1))
    return reshape(op.Mul(groups, unsqueeze(factors, -1)), size(w, 1), -1)


def permute(x: Value, expert_offsets: Value, row_to_slot: Value, top_k: Any = None) -> Value:
    slots = long(row_to_slot)
    if top_k is None:
        top_k = op.Div(length(row_to_slot), op.Max(length(x), int_scalar(1)))
    else:
        top_k = int_scalar(top_k)
    row = arange(length(row_to_slot))
    here = op.Less(row, op.Gather(long(expert_offsets), int_scalar(-1), axis=0))
    here = op.And(here, op.GreaterOrEqual(slots, int_scalar(0)))
    rows = op.Gather(wide(x), op.Div(op.Where(here, slots, int_scalar(0)), top_k), axis=0)
    return like(op.Where(unsqueeze(here, 1), rows, number(0)), x)


def unpermute(
    rows: Value, expert_offsets: Value, slot_to_row: Value, topk_weights: Value | None = None
) -> Value:
    weights = None if topk_weights is None else wide(topk_weights)
    y = combined(wide(rows), long(expert_offsets), long(slot_to_row), weights)
    return like(y, rows)


def combined(rows: Value, offsets: Value, slot_to_row: Value, weights: Value | None) -> Value:
    """Computes the (weighted) sums of the rows [N, H] of the tokens' slots, [T, H], in float32."""
    end = op.Gather(offsets, int_scalar(-1), axis=0)
    here = op.And(op.GreaterOrEqual(slot_to_row, int_scalar(0)), op.Less(slot_to_row, end))
    slots = op.Gather(rows, op.Where(here, slot_to_row, int_scalar(0)), axis=0)
    slots = op.Where(unsqueeze(here, -1), slots, number(0))
    if weights is not None:
        slots = op.Mul(slots, unsqueeze(op.Where(here, weights, number(0)), -1))
    return sum_of(slots, 1)


def moe_linear_map(x: Value, w: Value, topk_ids: Value, bias: Value | None = None) -> Value:
    offsets, row_to_slot, slot_to_row = sorted_slots(topk_ids, size(w, 0))
    top_k = int_scalar(size(topk_ids, 1))
    rows = op.Gather(wide(x), op.Div(row_to_slot, top_k), axis=0)
    made = product(rows, experts_of(w, bias), offsets, size(w, 1))
    return like(op.Gather(made, slot_to_row, axis=0), x)


def moe_linear_reduce(
    h: Value, w: Value, topk_weights: Value, topk_ids: Value, bias: Value | None = None
) -> Value:
    offsets, row_to_slot, slot_to_row = sorted_slots(topk_ids, size(w, 0))
    rows = op.Gather(reshape(wide(h), -1, size(w, 2)), row_to_slot, axis=0)
    made = product(rows, experts_of(w, bias), offsets, size(w, 1))
    return like(combined(made, offsets, slot_to_row, wide(topk_weights)), h)

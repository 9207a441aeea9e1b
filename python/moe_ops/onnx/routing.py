"""Routers and the sort by expert in ONNX.

TopK returns equal values in the order of their indices, which is the order of ties of the ops.

Letters: T tokens, E experts, K experts per token, N = T * K slots.
"""

from __future__ import annotations

import math
from typing import Any

from onnxscript import opset18 as op

from .values import (
    INT32,
    INT64,
    Value,
    arange,
    columns,
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

# The scores of moe_ops.formulas.scores.
_SCORES = {
    "softmax": lambda logits: op.Softmax(logits, axis=-1),
    "sigmoid": op.Sigmoid,
    "sqrtsoftplus": lambda logits: op.Where(
        op.Less(logits, number(-40)),
        op.Exp(op.Mul(logits, number(0.5))),
        op.Sqrt(op.Softplus(logits)),
    ),
}


def _top(values: Value, count: Any, axis: int = -1, largest: bool = True) -> tuple[Value, Value]:
    k = ints(count) if isinstance(count, int) else reshape(count, 1)
    found: tuple[Value, Value] = op.TopK(values, k, axis=axis, largest=int(largest), sorted=1)
    return found


def _finish(weights: Value, renormalize: bool, scale: float) -> Value:
    if renormalize:
        total = op.Add(sum_of(weights, -1, keepdims=True), number(1e-20))
        weights = op.Div(weights, total)
    return weights if scale == 1.0 else op.Mul(weights, number(scale))


def router_linear(
    x: Value, weight: Value, bias: Value | None = None, logits_dtype: Any = None
) -> Value:
    logits = op.MatMul(wide(x), op.Transpose(wide(weight), perm=[1, 0]))
    if bias is not None:
        logits = op.Add(logits, wide(bias))
    return like(logits, x, logits_dtype)


def topk_router(
    router_logits: Value,
    top_k: int,
    score_func: str = "softmax",
    topk_first: bool = False,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    expert_bias: Value | None = None,
    num_groups: int = 1,
    num_topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[Value, Value]:
    logits = wide(router_logits)
    scores = _SCORES[score_func](logits)
    needs_scores = expert_bias is not None or (num_groups > 1 and group_score == "top2_sum")
    key = logits if topk_first or not needs_scores else scores
    if expert_bias is not None:
        key = op.Add(key, wide(expert_bias))
    if num_groups > 1:
        num_experts = size(router_logits, 1)
        key = _without_losing_groups(key, num_experts, num_groups, num_topk_groups, group_score)
    _, ids = _top(key, top_k)
    if topk_first and score_func == "softmax":
        weights = op.Softmax(op.GatherElements(logits, ids, axis=1), axis=-1)
    else:
        weights = op.GatherElements(scores, ids, axis=1)
    return _finish(weights, renormalize, routed_scaling_factor), op.Cast(ids, to=INT32)


def _without_losing_groups(
    key: Value, num_experts: int, num_groups: int, num_topk_groups: int, group_score: str
) -> Value:
    """Returns the key [T, E], with -inf for experts outside of the best groups."""
    group_size = num_experts // num_groups
    grouped = reshape(key, 0, num_groups, group_size)
    best, _ = _top(grouped, 1 if group_score == "max" else min(2, group_size))
    _, kept = _top(sum_of(best, -1), num_topk_groups)
    is_kept = op.Equal(unsqueeze(kept, 1), unsqueeze(arange(int_scalar(num_groups)), 1))
    count = sum_of(op.Cast(is_kept, to=INT64), -1)  # [T, G]
    alive = op.Greater(unsqueeze(count, 2), int_scalar(0))
    return reshape(op.Where(alive, grouped, number(-math.inf)), 0, num_experts)


def topp_router(
    router_logits: Value,
    top_p: float,
    max_k: int,
    min_k: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
) -> tuple[Value, Value]:
    logits = wide(router_logits)
    num_experts = size(router_logits, 1)
    _, ids = _top(logits, num_experts)
    probs = op.GatherElements(op.Softmax(logits, axis=-1), ids, axis=1)
    # An expert is used while the sum over the experts before it is below top_p.
    before = op.CumSum(probs, int_scalar(1), exclusive=1)
    first = op.Less(arange(int_scalar(num_experts)), int_scalar(min_k))
    used = op.Or(op.Less(before, number(top_p)), first)
    probs, ids, used = (columns(t, 0, max_k) for t in (probs, ids, used))
    weights = op.Where(used, probs, number(0))
    ids = op.Where(used, ids, int_scalar(-1))
    return _finish(weights, renormalize, routed_scaling_factor), op.Cast(ids, to=INT32)


def expert_choice_router(
    router_logits: Value,
    capacity: Any,
    score_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
) -> tuple[Value, Value]:
    num_experts = size(router_logits, 1)
    scores = _SCORES[score_func](wide(router_logits))
    best, tokens = _top(scores, capacity, axis=0)
    zeros, ones = (op.Expand(number(n), op.Shape(t)) for n, t in ((0, scores), (1, best)))
    chosen = op.ScatterElements(zeros, tokens, ones, axis=0)
    # The selected experts first, in ascending order.
    _, ids = _top(chosen, num_experts)
    used = op.GatherElements(chosen, ids, axis=1)
    weights = op.Mul(op.GatherElements(scores, ids, axis=1), used)
    ids = op.Where(op.Greater(used, number(0)), ids, int_scalar(-1))
    return _finish(weights, False, routed_scaling_factor), op.Cast(ids, to=INT32)


def sorted_slots(topk_ids: Value, num_experts: int) -> tuple[Value, Value, Value]:
    """Sorts like `sort_by_expert`, in int64."""
    ids = reshape(long(topk_ids), -1)
    here = op.And(op.GreaterOrEqual(ids, int_scalar(0)), op.Less(ids, int_scalar(num_experts)))
    ids = op.Where(here, ids, int_scalar(num_experts))
    num_slots = length(ids)
    _, row_to_slot = _top(ids, num_slots, axis=0, largest=False)
    slot_to_row = op.ScatterElements(row_to_slot, row_to_slot, arange(num_slots), axis=0)
    is_of = op.Equal(unsqueeze(ids, 1), arange(int_scalar(num_experts)))
    ends = op.CumSum(sum_of(op.Cast(is_of, to=INT64), 0), int_scalar(0))
    offsets = op.Concat(ints(0), ends, axis=0)
    return offsets, row_to_slot, op.Reshape(slot_to_row, op.Shape(topk_ids))


def sort_by_expert(topk_ids: Value, num_experts: int) -> tuple[Value, ...]:
    return tuple(op.Cast(t, to=INT32) for t in sorted_slots(topk_ids, num_experts))

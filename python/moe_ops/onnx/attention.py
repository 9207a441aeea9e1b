"""Attention, rotary position embeddings and the norm in ONNX.

Letters: B batch, S tokens, K slots per token, n heads, d head size.
"""

from __future__ import annotations

import math

from onnxscript import opset18 as op

from .values import (
    INT64,
    Value,
    arange,
    halves,
    int_scalar,
    length,
    like,
    long,
    number,
    sum_of,
    unsqueeze,
    wide,
)


def add_rms_norm(
    x: Value,
    weight: Value,
    residual: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-6,
) -> tuple[Value, Value, Value]:
    total = wide(x)
    for other in (residual, bias):
        if other is not None:
            total = op.Add(total, wide(other))
    rounded = like(total, x)
    total = wide(rounded, x.dtype)
    mean = op.ReduceMean(op.Mul(total, total), op.Constant(value_ints=[-1]), keepdims=1)
    rstd = op.Reciprocal(op.Sqrt(op.Add(mean, number(eps))))
    y = op.Mul(op.Mul(total, rstd), wide(weight))
    return like(y, x), rounded, rstd


def rotary(t: Value, cos: Value, sin: Value, inverse: bool = False) -> Value:
    # One angle for all dimensions between the tokens and the features.
    between = [-2 - i for i in range(len(t.shape) - 3)]
    turn_cos, turn_sin = wide(cos), wide(sin)
    if between:
        turn_cos, turn_sin = unsqueeze(turn_cos, *between), unsqueeze(turn_sin, *between)
    if inverse:
        turn_sin = op.Neg(turn_sin)
    a, b = halves(wide(t))
    first = op.Sub(op.Mul(a, turn_cos), op.Mul(b, turn_sin))
    second = op.Add(op.Mul(b, turn_cos), op.Mul(a, turn_sin))
    return like(op.Concat(first, second, axis=-1), t)


def moa_attention(
    q: Value,
    k: Value,
    v: Value,
    kind: str,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    cu_seqlens: Value | None,
) -> tuple[Value, Value]:
    queries = op.Transpose(wide(q), perm=[0, 3, 2, 1, 4])  # [B, n, K, S, d]
    keys = unsqueeze(op.Transpose(wide(k), perm=[0, 2, 3, 1]), 2)  # [B, n, 1, d, S_kv]
    values = unsqueeze(op.Transpose(wide(v), perm=[0, 2, 1, 3]), 2)  # [B, n, 1, S_kv, d]
    logits = op.Mul(op.MatMul(queries, keys), number(scale))
    if softcap:
        logits = op.Mul(op.Tanh(op.Div(logits, number(softcap))), number(softcap))
    seen = _visible(length(q, 1), length(k, 1), causal, window, cu_seqlens)
    if kind == "softmax":
        if seen is not None:
            logits = op.Where(seen, logits, number(-math.inf))
        rest = op.ReduceLogSumExp(logits, op.Constant(value_ints=[-1]), keepdims=0)
        weights = op.Softmax(logits, axis=-1)
        if seen is not None:  # A query without keys gets zeros.
            weights = op.Where(seen, weights, number(0))
    else:
        # log(1 - z) and log z for z = sigmoid(logits), each key's part of the stick.
        left, taken = (op.Neg(op.Softplus(t)) for t in (logits, op.Neg(logits)))
        if seen is not None:
            left = op.Where(seen, left, number(0))
        after = op.CumSum(left, int_scalar(-1), exclusive=1, reverse=1)
        weights = op.Exp(op.Add(taken, after))
        if seen is not None:
            weights = op.Where(seen, weights, number(0))
        rest = op.Exp(sum_of(left, -1))
    out = op.Transpose(op.MatMul(weights, values), perm=[0, 3, 2, 1, 4])
    return like(out, q), op.Transpose(rest, perm=[0, 3, 2, 1])


def _visible(
    num_tokens: Value, num_keys: Value, causal: bool, window: int, cu_seqlens: Value | None
) -> Value | None:
    """Returns the keys that each query attends to, [S, S_kv]: queries are the last S positions.
    None: all."""
    key = arange(num_keys)
    position = unsqueeze(op.Add(arange(num_tokens), op.Sub(num_keys, num_tokens)), 1)
    seen = []
    if causal:
        seen.append(op.LessOrEqual(key, position))
    if window:
        seen.append(op.Less(op.Abs(op.Sub(position, key)), int_scalar(window)))
    if cu_seqlens is not None:
        begins = op.LessOrEqual(unsqueeze(long(cu_seqlens), 1), key)
        sequence = sum_of(op.Cast(begins, to=INT64), 0)
        seen.append(op.Equal(unsqueeze(sequence, 1), sequence))
    result = None
    for part in seen:
        result = part if result is None else op.And(result, part)
    return result

"""moa_attention: attention of mixture-of-attention experts, without repeated keys and values."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import (
    direct_call,
    needs_input_grad,
    only_needed,
    register_autograd,
    register_no_double_backward,
)
from moe_ops.ops._checks import (
    accumulate_dtype,
    check,
    check_dim,
    check_dtype,
    check_float,
    check_index,
    check_like,
    check_same_device,
    check_size,
)
from moe_ops.ops._library import register_fake

_moa_attention = direct_call("moa_attention")
_moa_attention_bwd = direct_call("moa_attention_bwd")

KINDS = ("softmax", "stick_breaking")
MAX_HEAD_SIZE = 256


def moa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes attention of K query slots per token over one set of keys and values.

    Head h of every slot attends to key-value head h, so the K experts of a token share its keys and
    values without copies. The S queries are the last S of the S_kv positions; S < S_kv is decoding
    with a cache. Memory beyond the result grows linearly with S.

    With logits ``l[i, j] = scale * <q[i], k[j]>`` of the keys j that query i attends to:

    - ``"softmax"``: weights ``exp(l[i, j]) / sum_m exp(l[i, m])``.
    - ``"stick_breaking"``: with ``z = sigmoid(l)``, weights ``z[i, j] * prod_m (1 - z[i, m])`` over
      the keys m after j: the last key takes a fraction of a stick of length one, the key before it
      a fraction of the rest, and so on. No position encoding is needed.

    Args:
        q: [B, S, K, n, d]; float64, float32, bfloat16 or float16, any strides; d from 1 to 256.
        k: [B, S_kv, n, d] in q's dtype, any strides.
        v: [B, S_kv, n, d] in q's dtype, any strides.
        kind: "softmax" or "stick_breaking".
        causal: a query attends to its own position and earlier ones. Needs S_kv >= S.
        scale: factor of the dot products; None is d ** -0.5.
        window: a query attends to keys less than `window` positions away (itself and the window - 1
            before it if causal); at least 1. None: no limit. Needs S_kv >= S.
        cu_seqlens: [num_sequences + 1] int32 or int64, nondecreasing from 0 to S: offsets of
            concatenated independent sequences in q, k and v; B must be 1 and S_kv equal S.
        softcap: positive; logits become ``softcap * tanh(l / softcap)``. None: no cap.

    Returns:
        [B, S, K, n, d] in q's dtype. With "stick_breaking" also the rest of each stick, [B, S, K,
        n] in fp32 (fp64 for fp64): one minus the sum of the weights. Both are differentiable. Sums
        run in fp32 (fp64 for fp64) in a fixed order, bitwise identical for any number of threads. A
        query without keys gets zeros (and keeps its whole stick). Masked keys do not affect a
        query's result or gradients, even if infinite or NaN. In fp32, a stick shorter than about
        2^-126 is empty: earlier keys are not read. Results below the normal range may be zero.

    Raises:
        ValueError: wrong dtype, rank, size or argument, or invalid cu_seqlens.
        NotImplementedError: on a second derivative.

    Source:
        Zhang et al. 2022, Mixture of Attention Heads, arXiv 2210.05144 (softmax; JetMoE, arXiv
        2404.07413); Shen et al. 2023, ModuleFormer, arXiv 2306.04640 (stick-breaking).
    """
    op = "moa_attention"
    # The op uses numbers in place of None, so a number that means None to it is rejected here.
    check(window is None or window >= 1, f"{op}: window must be at least 1, got {window}.")
    check(
        softcap is None or softcap > 0,
        f"{op}: softcap must be positive and finite, got {softcap}.",
    )
    if scale is None:
        check_dim(op, "q", q, 5, "[B, S, K, n, d]")
        scale = max(1, q.shape[-1]) ** -0.5
    out, remainder = _moa_attention(
        q,
        k,
        v,
        kind,
        causal,
        float(scale),
        0 if window is None else int(window),
        0.0 if softcap is None else float(softcap),
        cu_seqlens,
    )
    return out if kind == "softmax" else (out, remainder)


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    cu_seqlens: Tensor | None,
) -> None:
    check_float(op, "q", q, "[B, S, K, n, d]")
    for name, t in (("k", k), ("v", v)):
        sizes = {"B": q.shape[0], "n": q.shape[3], "d": q.shape[4]}
        check_like(op, name, t, "q", q, "[B, S_kv, n, d]", **sizes)
    check_size(op, "v", v, 1, k.shape[1], "S_kv")
    check(kind in KINDS, f'{op}: kind must be "softmax" or "stick_breaking", got "{kind}".')
    check(
        1 <= q.shape[4] <= MAX_HEAD_SIZE,
        f"{op}: q must have d from 1 to {MAX_HEAD_SIZE} in dimension 4, got shape {list(q.shape)}.",
    )
    check(math.isfinite(scale), f"{op}: scale must be finite, got {scale}.")
    check(
        math.isfinite(softcap) and softcap >= 0,
        f"{op}: softcap must be positive and finite, got {softcap}.",
    )
    check(window >= 0, f"{op}: window must be at least 1, got {window}.")
    check_same_device(op, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check_index(op, "cu_seqlens", cu_seqlens, "[num_sequences + 1]")
        check(
            q.shape[0] == 1,
            f"{op}: q must be [1, S, K, n, d] with cu_seqlens, got shape {list(q.shape)}.",
        )
        check(
            k.shape[1] == q.shape[1],
            f"{op}: k must have S = {q.shape[1]} in dimension 1 with cu_seqlens, got shape "
            f"{list(k.shape)}.",
        )
    elif causal or window > 0:
        check(
            k.shape[1] >= q.shape[1],
            f"{op}: k must have at least the S = {q.shape[1]} keys of the queries when causal or "
            f"with a window, got shape {list(k.shape)}.",
        )


@register_fake("moa_attention")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    _check("moa_attention", *args)
    q = args[0]
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=accumulate_dtype(q.dtype))


@register_fake("moa_attention_bwd")
def _(grad_out: Tensor, _: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    op = "moa_attention_bwd"
    q, k, v, _out, _state, *rest = args
    _check(op, q, k, v, *rest)
    check_dtype(op, "grad_out", grad_out.dtype, (q.dtype,), " like q")
    check_same_device(op, q=q, grad_out=grad_out)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *arguments, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.arguments = arguments


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    *saved, cu_seqlens = ctx.saved_tensors
    grads = _moa_attention_bwd(grad_out, grad_state, *saved, *ctx.arguments, cu_seqlens)
    return *only_needed(grads, needs_input_grad(ctx, 3)), *[None] * 6


register_autograd("moa_attention", _backward, _setup)
register_no_double_backward("moa_attention_bwd")
register_autocast("moa_attention", ["q", "k", "v"])

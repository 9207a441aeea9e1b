"""attention_decode: the attention block of a decoder layer for a few new tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_ops.formulas.attention_block import attend
from moe_ops.formulas.dense_layer import Linear, linear, rms_norm
from moe_ops.formulas.dtypes import accumulate_dtype
from moe_ops.formulas.rotary import turned
from moe_ops.weight_formats import split_formats


def attention_decode(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    *,
    rotary_size: int,
    scale: float,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    b_o: Tensor | None = None,
    w_q_scale: Tensor | None = None,
    w_k_scale: Tensor | None = None,
    w_v_scale: Tensor | None = None,
    w_o_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    head_eps: float = 1e-6,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    residual_scale: float = 1.0,
    formats: str = "float",
    attend_heads: Callable[..., Tensor] | None = None,
    product: Linear = linear,
) -> Tensor:
    """Computes :func:`moe_ops.attention_decode`; writes the new keys and values into the cache.

    attend_heads computes, if given, all that is between the projections: the kernel
    ``moe_ops_cuda::attend_decode``.

    Projections have inputs and outputs in x's dtype. Head norms, angles, scores, softmax and
    weighted sums are computed in float32 (float64 for float64). Heads of a group share one copy of
    their keys.
    """
    kinds = split_formats(formats, 4) or ()
    acc = accumulate_dtype(x.dtype)
    h = rms_norm(x, norm_weight, eps)
    q = product(h, w_q, w_q_scale, b_q, kinds[0])
    k = product(h, w_k, w_k_scale, b_k, kinds[1])
    v = product(h, w_v, w_v_scale, b_v, kinds[2])
    attend_all = attend_heads or _attend_heads
    caches = (cos, sin, keys, values, start, rotary_size, scale)
    mixed = attend_all(q, k, v, *caches, q_norm, k_norm, head_eps, mask, sinks)
    y = product(mixed, w_o, w_o_scale, b_o, kinds[3])
    return torch.add(x.to(acc), y, alpha=residual_scale).to(x.dtype)


def _attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    rotary_size: int,
    scale: float,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    head_eps: float,
    mask: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Writes k and v [B, S, m d] into the caches and returns what q [B, S, n d] attends to."""
    acc = accumulate_dtype(q.dtype)
    groups, size = keys.shape[1], keys.shape[3]
    end, half = start + q.shape[1], rotary_size // 2
    angles = [f[:, :, None, :half].to(acc) for f in (cos, sin)]

    def heads(t: Tensor, weight: Tensor | None) -> Tensor:
        """Converts [B, S, heads * d] to normalized and rotated [B, S, heads, d]."""
        t = t.to(acc)
        if weight is not None:
            t = rms_norm(t.unflatten(2, (-1, weight.shape[0])), weight, head_eps).flatten(2)
        t = t.unflatten(2, (-1, size))
        if half == 0:
            return t
        pairs = t[..., :rotary_size].unflatten(-1, (2, half))
        return torch.cat((turned(pairs, *angles).flatten(-2), t[..., rotary_size:]), -1)

    dtype, q, k = q.dtype, heads(q, q_norm), heads(k, k_norm)
    keys[:, :, start:end] = k.transpose(1, 2).to(keys.dtype)
    values[:, :, start:end] = v.unflatten(2, (groups, size)).transpose(1, 2)

    # [B, S, m g, d] to [B, m, g S, d]: one GEMM per group.
    q = (q * scale).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    scores = q.flatten(2, 3) @ keys[:, :, :end].to(acc).mT
    if sinks is not None:
        sinks = sinks.view(groups, -1)
    scores = scores.unflatten(2, q.shape[2:4])
    mixed = attend(scores, values[:, :, :end], mask, start, sinks)
    return mixed.permute(0, 3, 1, 2, 4).flatten(2).to(dtype)

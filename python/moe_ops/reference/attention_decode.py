from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._attention_block import attention_weights, dense, rms_norm, turn
from ._codes import formats_of
from ._common import acc_dtype


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
    formats: str | Sequence[str] = "float",
) -> Tensor:
    """Computes x + residual_scale * attention(norm(x)), and writes the keys and values of x into
    the cache."""
    acc = acc_dtype(x.dtype)
    kinds = formats_of(formats, 4)
    batch, length, _ = x.shape
    kv_heads, size = keys.shape[1], keys.shape[3]
    end = start + length

    def heads(t: Tensor, weight: Tensor | None) -> Tensor:
        """Converts [B, S, heads * d] to rotated [B, heads, S, d]."""
        shape = (batch, length, t.shape[2] // size, size)
        of_heads = weight is None or weight.shape[0] == size
        t = rms_norm(t.view(shape) if of_heads else t, weight, head_eps).reshape(shape)
        turned, rest = t.split((rotary_size, size - rotary_size), dim=-1)
        return torch.cat((turn(turned, cos, sin), rest), dim=-1).transpose(1, 2)

    h = rms_norm(x.to(acc), norm_weight, eps)
    q = heads(dense(h, w_q, w_q_scale, b_q, kinds[0]), q_norm)
    keys[:, :, start:end] = heads(dense(h, w_k, w_k_scale, b_k, kinds[1]), k_norm).to(keys.dtype)
    v = dense(h, w_v, w_v_scale, b_v, kinds[2]).unflatten(2, (kv_heads, size)).transpose(1, 2)
    values[:, :, start:end] = v.to(values.dtype)

    group = q.shape[1] // kv_heads
    k, v = (t[:, :, :end].to(acc).repeat_interleave(group, 1) for t in (keys, values))
    weights = attention_weights(q @ k.transpose(2, 3) * scale, mask, start, sinks)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return (x.to(acc) + residual_scale * dense(mixed, w_o, w_o_scale, b_o, kinds[3])).to(x.dtype)

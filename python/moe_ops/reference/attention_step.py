from __future__ import annotations

import torch
from torch import Tensor

from ._codes import dequantized
from ._common import acc_dtype


def attention_step(
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
) -> Tensor:
    """x + residual_scale * attention(norm(x)), with keys and values of x written into theirs."""
    acc = acc_dtype(x.dtype)
    batch, length, _ = x.shape
    kv_heads, size = keys.shape[1], keys.shape[3]
    end = start + length

    def dense(t: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None) -> Tensor:
        if w_scale is not None:
            w = dequantized(w[None], w_scale[None])[0]
        y = t @ w.to(acc).T
        return y if bias is None else y + bias.to(acc)

    def norm(t: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
        if weight is None:
            return t
        t = t if t.shape[-1] == weight.shape[0] else t.flatten(2)
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + epsilon) * weight.to(acc)

    def heads(t: Tensor, weight: Tensor | None) -> Tensor:
        """[B, S, heads * d] to rotated [B, heads, S, d]."""
        shape = (batch, length, t.shape[2] // size, size)
        t = norm(t.view(shape), weight, head_eps).reshape(shape)
        turned, rest = t.split((rotary_size, size - rotary_size), dim=-1)
        a, b = turned.chunk(2, dim=-1)
        c, s = (f.to(acc)[:, :, None, : rotary_size // 2] for f in (cos, sin))
        return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1).transpose(1, 2)

    h = norm(x.to(acc), norm_weight, eps)
    q = heads(dense(h, w_q, w_q_scale, b_q), q_norm)
    keys[:, :, start:end] = heads(dense(h, w_k, w_k_scale, b_k), k_norm).to(keys.dtype)
    v = dense(h, w_v, w_v_scale, b_v).unflatten(2, (kv_heads, size)).transpose(1, 2)
    values[:, :, start:end] = v.to(values.dtype)

    group = q.shape[1] // kv_heads
    k, v = (t[:, :, :end].to(acc).repeat_interleave(group, 1) for t in (keys, values))
    scores = q @ k.transpose(2, 3) * scale
    if mask is None:
        mask = torch.ones(length, end, dtype=torch.bool, device=x.device).tril(start)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask.to(acc)
    if sinks is not None:
        column = sinks.to(acc)[None, :, None, None].expand(batch, -1, length, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., :end]
    weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return (x.to(acc) + residual_scale * dense(mixed, w_o, w_o_scale, b_o)).to(x.dtype)

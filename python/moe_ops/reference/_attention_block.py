from __future__ import annotations

import torch
from torch import Tensor

from ._codes import dequantized


def dense(t: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, format: str) -> Tensor:
    """The dense layer of t, in t's type."""
    if w_scale is not None:
        w = dequantized(w, w_scale, format=format)
    y = t @ w.to(t.dtype).T
    return y if bias is None else y + bias.to(t.dtype)


def rms_norm(t: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return t
    return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps) * weight.to(t.dtype)


def turn(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates features i and i + r of t [B, S, heads, 2 r] by the angles [B or 1, S, r or more]."""
    a, b = t.chunk(2, dim=-1)
    c, s = (f.to(t.dtype)[:, :, None, : a.shape[-1]] for f in (cos, sin))
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def attention_weights(
    scores: Tensor, mask: Tensor | None, start: int, sinks: Tensor | None = None
) -> Tensor:
    """Computes softmax of scores [B, n, S, start + S]; zeros if all keys of a query are masked."""
    batch, _, length, end = scores.shape
    if mask is None:
        mask = torch.ones(length, end, dtype=torch.bool, device=scores.device).tril(start)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask.to(scores.dtype)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(batch, -1, length, 1)
        scores = torch.cat((scores, column), dim=-1)
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1)[..., :end].masked_fill(hidden, 0.0)

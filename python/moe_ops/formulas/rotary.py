"""rotary: rotary position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.formulas.dtypes import accumulate_dtype


def rotary(t: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Computes :func:`moe_ops.rotary`; differentiable in t."""
    acc = accumulate_dtype(t.dtype)
    heads = (1,) * (t.dim() - 3)
    cos, sin = (f.detach().to(acc).reshape(*f.shape[:-1], *heads, f.shape[-1]) for f in (cos, sin))
    halves = t.to(acc).unflatten(-1, (2, t.shape[-1] // 2))
    return turned(halves, cos, -sin if inverse else sin).flatten(-2).to(t.dtype)


def turned(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs [..., 2, r], one in each column, by angles [..., r]; all of one dtype."""
    signed = torch.stack((-sin, sin), -2)
    return torch.addcmul(pairs * cos.unsqueeze(-2), pairs.flip(-2), signed)

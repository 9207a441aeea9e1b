from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype


def rotary(t: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotates features i and i + d / 2 of t [B, S, ..., d] as pairs; the angles are constants."""
    acc = acc_dtype(t.dtype)
    shape = cos.shape[:-1] + (1,) * (t.dim() - 3) + cos.shape[-1:]
    cos, sin = (f.detach().to(acc).view(shape) for f in (cos, -sin if inverse else sin))
    a, b = t.to(acc).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(t.dtype)

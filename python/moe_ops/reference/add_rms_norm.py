from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Returns sum / sqrt(mean of its squares + eps) * weight, and sum = x + residual + bias."""
    acc = acc_dtype(x.dtype)
    total = x
    if residual is not None or bias is not None:
        wide = x.to(acc)
        if residual is not None:
            wide = wide + residual.to(acc)
        if bias is not None:
            wide = wide + bias.to(acc)
        total = wide.to(x.dtype)
    wide = total.to(acc)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(acc)).to(x.dtype), total

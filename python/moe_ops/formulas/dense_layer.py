"""GEMMs and norms of the decode blocks, with inputs and results in x's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from moe_ops.formulas.codes import dequantized
from moe_ops.formulas.dtypes import accumulate_dtype

# x, weight, scale, bias, format: as of `linear`.
Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, str], Tensor]


def linear(x: Tensor, w: Tensor, scale: Tensor | None, bias: Tensor | None, format: str) -> Tensor:
    """Returns `x w^T + bias`; w is in x's dtype, or of `format` with scales."""
    if scale is not None:
        w = dequantized(w, scale, format=format, dtype=accumulate_dtype(x.dtype)).to(x.dtype)
    return F.linear(x, w, bias)


def rms_norm(t: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalizes the last dimension, with float32 (float64 for float64) arithmetic; returns t if
    weight is None."""
    if weight is None or t.numel() == 0:
        return t
    return F.rms_norm(t, weight.shape, weight.to(t.dtype), eps)

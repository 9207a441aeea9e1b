from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype


def router_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes x weight^T + bias, summed in fp32 (fp64 for fp64)."""
    acc = acc_dtype(x.dtype)
    logits = x.to(acc) @ weight.to(acc).T
    if bias is not None:
        logits = logits + bias.to(acc)
    return logits.to(logits_dtype or x.dtype)

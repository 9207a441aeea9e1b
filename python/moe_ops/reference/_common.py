from __future__ import annotations

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def order_descending(key: Tensor, excluded: Tensor | None = None, dim: int = -1) -> Tensor:
    """Returns indices by key descending, ties to the smaller index; NaN last, `excluded` after
    NaN."""
    key = key.detach()
    rank = key.isnan().to(torch.int8)
    if excluded is not None:
        rank = rank.masked_fill(excluded, 2)
    by_key = key.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(
        dim=dim, descending=True, stable=True
    )
    return by_key.gather(dim, rank.gather(dim, by_key).argsort(dim=dim, stable=True))

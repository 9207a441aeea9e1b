"""Types that ops compute in."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type that sums over values of `dtype` run in."""
    return torch.float64 if dtype == torch.float64 else torch.float32

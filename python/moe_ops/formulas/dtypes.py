"""Dtypes of computations in ops."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32

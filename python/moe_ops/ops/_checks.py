"""What a fake implementation asks of its arguments, in the words of the kernels' own checks."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTS = (torch.int32, torch.int64)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(op: str, name: str, t: Tensor) -> None:
    check(
        t.dtype in _FLOATS,
        f"{op}: {name} must be float64, float32, bfloat16 or float16, got {dtype_name(t.dtype)}.",
    )


def check_index(op: str, name: str, t: Tensor) -> None:
    check(
        t.dtype in _INTS,
        f"{op}: {name} must be int32 or int64, got {dtype_name(t.dtype)}.",
    )


def check_dim(op: str, name: str, t: Tensor, dim: int, shape: str) -> None:
    check(
        t.dim() == dim,
        f"{op}: {name} must be {shape} ({dim} dimensions), got shape {list(t.shape)}.",
    )


def check_size(op: str, name: str, t: Tensor, d: int, n: int, what: str) -> None:
    check(
        t.shape[d] == n,
        f"{op}: {name} must have {what} = {n} in dimension {d}, got shape {list(t.shape)}.",
    )


def check_same_dtype(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    check(
        t.dtype == like.dtype,
        f"{op}: {name} must be {dtype_name(like.dtype)} like {like_name}, "
        f"got {dtype_name(t.dtype)}.",
    )


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """A fake implementation must refuse what the real one cannot run."""
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        check(
            t is None or t.device == first.device,
            f"{op}: {name} must be on {first.device} like {first_name}, "
            f"got {t.device if t is not None else None}.",
        )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

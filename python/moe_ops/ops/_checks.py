"""Argument checks of fake implementations, with the messages of the kernels' own checks.

Shapes are written as in the docstrings: `check_float(op, "x", x, "[T, H]", H=64)` requires two
dimensions and size 64 in the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.dtypes import accumulate_dtype as accumulate_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW_FLOATS = FLOATS[1:]
_INTS = (torch.int32, torch.int64)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_dtype(
    op: str, name: str, dtype: torch.dtype, wanted: Sequence[torch.dtype], why: str = ""
) -> None:
    if dtype in wanted:
        return
    *names, last = (dtype_name(d) for d in wanted)
    listed = f"{', '.join(names)} or {last}" if names else last
    raise ValueError(f"{op}: {name} must be {listed}{why}, got {dtype_name(dtype)}.")


def check_float(op: str, name: str, t: Tensor | None, shape: str = "", **sizes: Any) -> None:
    check_tensor(op, name, t, FLOATS, shape, **sizes)


def check_index(op: str, name: str, t: Tensor | None, shape: str, **sizes: Any) -> None:
    check_tensor(op, name, t, _INTS, shape, **sizes)


def check_tensor(
    op: str,
    name: str,
    t: Tensor | None,
    dtypes: Sequence[torch.dtype],
    shape: str = "",
    **sizes: Any,
) -> None:
    """Checks for one of the dtypes, and for the shape if given. None is an omitted argument."""
    if t is None:
        return
    check_dtype(op, name, t.dtype, dtypes)
    if shape:
        check_shape(op, name, t, shape, **sizes)


def check_like(
    op: str, name: str, t: Tensor | None, like_name: str, like: Tensor, shape: str, **sizes: Any
) -> None:
    """Calls `check_tensor` with the dtype of another argument."""
    if t is None:
        return
    check_dtype(op, name, t.dtype, (like.dtype,), f" like {like_name}")
    check_shape(op, name, t, shape, **sizes)


def check_shape(op: str, name: str, t: Tensor, shape: str, **sizes: Any) -> None:
    letters = shape.strip("[]").split(", ")
    check_dim(op, name, t, len(letters), shape)
    for letter, size in sizes.items():
        check_size(op, name, t, letters.index(letter), size, letter)


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


def check_offsets(op: str, expert_offsets: Tensor) -> None:
    """Checks [E+1] with at least one expert."""
    check_index(op, "expert_offsets", expert_offsets, "[E+1]")
    check(
        expert_offsets.shape[0] >= 2,
        f"{op}: expert_offsets must be [E+1] with at least one expert, "
        f"got shape {list(expert_offsets.shape)}.",
    )


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    check(value in choices, f"{op}: {name} must be one of {', '.join(choices)}, got '{value}'.")


def check_positive(name: str, **sizes: int) -> None:
    for what, size in sizes.items():
        check(size >= 1, f"{name}: {what} must be at least 1, got {size}.")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Checks that all tensors are on one device: a fake implementation must reject calls that the
    real one cannot run."""
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        check(
            t is None or t.device == first.device,
            f"{op}: {name} must be on {first.device} like {first_name}, "
            f"got {t.device if t is not None else None}.",
        )


def check_result_dtype(op: str, name: str, dtype: torch.dtype, x: Tensor) -> None:
    """Checks a result's dtype, which also is its gradient's: x's dtype or the accumulation
    dtype."""
    wanted = dict.fromkeys((x.dtype, accumulate_dtype(x.dtype)))
    check_dtype(op, name, dtype, tuple(wanted))


def new_if(
    needed: bool, like: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns a new gradient with the shape of `like` or the given one, or [0] if it is not
    needed."""
    size = tuple(like.shape if shape is None else shape)
    return like.new_empty(size if needed else (0,), dtype=dtype)


def is_stored_transposed(w: Tensor) -> bool:
    """Returns whether [E, O, K] is a view of a contiguous [E, K, O] on a CUDA device. The gradient
    of such a weight (gpt-oss, Llama 4) has the same layout."""
    return w.is_cuda and not w.is_contiguous() and w.mT.is_contiguous()


def given(
    found: Iterable[Tensor | None], like: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Returns an op's outputs, with [0] in place of None."""
    return tuple(like.new_empty((0,), dtype=dtype) if t is None else t for t in found)


def new_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a new dense tensor with the shape and, unless given, the dtype of `t`."""
    return t.new_empty(tuple(t.shape), dtype=dtype)

"""Checks of weights of 8 or 4 bits, which several ops take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check,
    check_dim,
    check_dtype,
    check_like,
    check_size,
    check_tensor,
    dtype_name,
)

_GROUPS = (32, 64, 128)


def check_quantized(op: str, name: str, w: Tensor, scale: Tensor) -> int:
    """Checks a weight and `{name}_scale`; returns the length D of the rows."""
    check(
        w.dtype in (torch.int8, torch.uint8),
        f"{op}: {name} must be int8, or uint8 with two 4-bit weights a byte, "
        f"got {dtype_name(w.dtype)}.",
    )
    four = w.dtype == torch.uint8
    check_dim(op, name, w, 3, "[E, O, D/2]" if four else "[E, O, D]")
    scale_name = f"{name}_scale"
    check_tensor(op, scale_name, scale, (torch.float32,))
    shape = "[E, O, D/G] beside 4-bit weights" if four else "[E, O] beside int8 weights"
    check_dim(op, scale_name, scale, 3 if four else 2, shape)
    check_size(op, scale_name, scale, 0, w.shape[0], "E")
    check_size(op, scale_name, scale, 1, w.shape[1], "the number of features")
    depth = w.shape[2] * (2 if four else 1)
    if four:
        groups = scale.shape[2]
        check(
            any(groups * group == depth for group in _GROUPS),
            f"{op}: {scale_name} must have a scale for each group of 32, 64 or 128 of the {depth} "
            f"weights of a row, got shape {list(scale.shape)}.",
        )
    return depth


def check_dense(
    op: str, args: Mapping[str, Any], name: str, x: Tensor, features: int | None, depth: int
) -> None:
    """Checks the dense layer `w_{name}` [features, depth] among the arguments of an op, float or
    codes with `w_{name}_scale`, and `b_{name}` if the op has it. features None: any number."""
    what = f"w_{name}"
    w, scale = args[what], args[f"{what}_scale"]
    if scale is None:
        check_like(op, what, w, "x", x, "[O, K]", K=depth)
    else:
        check_dtype(op, "x", x.dtype, NARROW_FLOATS, " beside codes")
        check_dim(op, what, w, 2, "[O, K]")
        found = check_quantized(op, what, w[None], scale[None])
        check(
            found == depth,
            f"{op}: {what} must have rows of {depth} weights, got {found} (shape {list(w.shape)}).",
        )
    if features is not None:
        check_size(op, what, w, 0, features, "the number of features")
    check_like(op, f"b_{name}", args.get(f"b_{name}"), "x", x, "[O]", O=w.shape[0])

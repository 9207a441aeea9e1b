"""Checks of weights of few bits, which several ops take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.codes import FP8_BLOCK, format_of
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


_FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
# Format -> bits of a weight, steps that share a scale (0: any multiple of 32), bytes of a record.
_RECORDS = {"mxfp4": (4, 32, None), "q4_k": (4, 256, 16), "q6_k": (6, 256, 18)}


def has_kernels(w: Tensor, scale: Tensor, zero: Tensor | None) -> bool:
    """Whether a weight has one of the two formats that have kernels on CUDA."""
    if zero is not None or scale.dtype != torch.float32 or w.dtype == torch.float8_e4m3fn:
        return False
    if w.dtype == torch.int8:
        return scale.dim() == 2
    groups = scale.shape[-1]
    return any(groups * group == 2 * w.shape[-1] for group in _GROUPS)


def check_codes(op: str, name: str, w: Tensor, scale: Tensor, zero: Tensor | None) -> int:
    """Checks a weight in any format of moe_ffn_quantized; returns the length D of the rows."""
    check(
        w.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn),
        f"{op}: {name} must be int8, uint8 with two 4-bit weights a byte, or float8_e4m3fn, "
        f"got {dtype_name(w.dtype)}.",
    )
    check_dim(op, name, w, 3, "[E, O, D/2]" if w.dtype == torch.uint8 else "[E, O, D]")
    scale_name, kind = f"{name}_scale", format_of(w, scale)
    experts, features, size = w.shape
    if zero is not None:
        check(
            kind == "int4" and zero.dtype == torch.uint8 and zero.shape == scale.shape,
            f"{op}: {name}_zero must be uint8 of the shape of {scale_name} beside 4-bit weights "
            f"with scales of groups, got {dtype_name(zero.dtype)} of shape {list(zero.shape)}.",
        )
    if kind == "int8" or (kind == "int4" and has_kernels(w, scale, None)):
        return check_quantized(op, name, w, scale)
    check_size(op, scale_name, scale, 0, experts, "E")
    if kind == "fp8":
        check_tensor(op, scale_name, scale, (torch.float32,))
        check_dim(op, scale_name, scale, 3, "[E, O / 128, D / 128]")
        for dim, length in ((1, features), (2, size)):
            check_size(op, scale_name, scale, dim, -(-length // FP8_BLOCK), "blocks of 128")
        return size
    check_size(op, scale_name, scale, 1, features, "the number of features")
    bits, group, record = _RECORDS.get(kind, (8 if w.dtype == torch.int8 else 4, 0, None))
    depth = size * 8 // bits
    dims = "[E, O, D/G]" if record is None else "[E, O, D/256, 16 or 18]"
    check_dim(op, scale_name, scale, 3 if record is None else 4, dims)
    if record is not None:
        check_size(op, scale_name, scale, 3, record, "bytes of a record of scales")
    if kind not in _RECORDS:
        check_dtype(op, scale_name, scale.dtype, _FLOAT_SCALES, " or bytes of a known format")
    groups = scale.shape[2]
    found = depth // groups if groups else 0
    check(
        groups * found == depth and (found % 32 == 0 if group == 0 else found in (0, group)),
        f"{op}: {scale_name} must have a scale for each group of {group or 'a multiple of 32'} of "
        f"the {depth} weights of a row, got shape {list(scale.shape)}.",
    )
    return depth


def _refused_format(w: Tensor, scale: Tensor | None) -> str:
    """Returns the name of a format that `check_codes` takes and `check_dense` does not, or ""."""
    if w.dtype == torch.float8_e4m3fn:
        return "fp8 in blocks"
    if scale is None or w.dim() != 2:
        return ""
    if w.dtype == torch.int8:
        return "int8 in groups" if scale.dim() == 2 else ""
    if w.dtype != torch.uint8:
        return ""
    if scale.dtype == torch.uint8:
        if scale.dim() == 2:
            return "MXFP4"
        return {16: "q4_K", 18: "q6_K"}.get(scale.shape[2], "") if scale.dim() == 3 else ""
    if scale.dim() != 2:
        return ""
    if scale.dtype in (torch.float16, torch.bfloat16):
        return f"4 bits with scales in {dtype_name(scale.dtype)}"
    depth, groups = 2 * w.shape[1], scale.shape[1]
    if scale.dtype != torch.float32 or groups == 0 or depth % groups != 0:
        return ""
    group = depth // groups
    known = group == 0 or group % 32 != 0 or group in _GROUPS
    return "" if known else f"4 bits in groups of {group}"


def check_dense(
    op: str, args: Mapping[str, Any], name: str, x: Tensor, features: int | None, depth: int
) -> None:
    """Checks the dense layer `w_{name}` [features, depth] among the arguments of an op, float or
    codes with `w_{name}_scale`, and `b_{name}` if the op has it. features None: any number."""
    what = f"w_{name}"
    w, scale = args[what], args[f"{what}_scale"]
    refused = _refused_format(w, scale)
    if refused:
        scales = "without scales"
        if scale is not None:
            scales = f"with {dtype_name(scale.dtype)} scales of shape {list(scale.shape)}"
        raise ValueError(
            f"{op}: {what} must be {dtype_name(x.dtype)} like x, int8 with float32 scales [O], or "
            f"4 bits (uint8) with float32 scales [O, K/G] of G = 32, 64 or 128, got {refused} "
            f"({dtype_name(w.dtype)} of shape {list(w.shape)} {scales})."
        )
    if w.dtype in (torch.int8, torch.uint8):
        check(scale is not None, f"{op}: {what}_scale must be given beside codes, got None.")
    else:
        check(
            scale is None,
            f"{op}: {what}_scale must be None beside a weight that is no codes, got shape "
            f"{None if scale is None else list(scale.shape)} beside {dtype_name(w.dtype)}.",
        )
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

"""Checks of quantized weights, which several ops take: the name of a format says what its tensors
are (moe_ops.weight_formats)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting

from moe_ops.formulas.dense_layer import linear
from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops._checks import (
    NARROW_FLOATS,
    check,
    check_dtype,
    check_like,
    check_size,
    dtype_name,
)
from moe_ops.weight_formats import WeightFormat, parse_format, split_formats

_STORED_ROWS = 64  # Per expert, on average.
_FLOAT = "float"  # The name of a weight in x's dtype among the formats of a block's weights.


def joined(names: str | Sequence[str]) -> str:
    """Returns the names of formats as ops take them: "int4 g64", or "q4_k, q6_k"."""
    return names if isinstance(names, str) else ", ".join(names)


def check_names(op: str, arg: str, names: str, count: int) -> tuple[str, ...]:
    """Returns the names of the formats of `count` weights."""
    found = split_formats(names, count)
    check(
        found is not None,
        f"{op}: {arg} must be one name or one for each of {count} weights, got '{names}'.",
    )
    assert found is not None
    return found


def check_name(op: str, name: str) -> WeightFormat:
    found = parse_format(name)
    check(
        found is not None,
        f"{op}: format must name a format of quantized weights such as 'int8', 'int4 g64' or "
        f"'mxfp4', got '{name}'.",
    )
    assert found is not None
    return found


def have_kernels(names: str, count: int) -> bool:
    """Returns whether all of these formats have kernels of integers; False for other names."""
    found = split_formats(names, count) or ()
    formats = [parse_format(name) for name in found]
    return bool(formats) and all(how is not None and how.has_kernels for how in formats)


def reads_stored(num_rows: int, num_experts: int) -> bool:
    """Returns whether CUDA kernels read weights of formats without integer kernels as they are
    stored, for so many rows in all; otherwise, they become numbers of x's dtype first.

    The kernel reads an expert's weights once per 8 rows. Dequantizing moves 20 to 55 bytes per
    weight of all experts, which is as much as this does for 180 rows per expert or more. The limit
    is lower because experts have unequal numbers of rows.
    """
    if is_batch_invariant_enabled():
        return True
    most = _STORED_ROWS * num_experts
    if not is_exporting():
        return num_rows <= most
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # A comparison would limit an exported program to numbers of rows like that of its example.
    return statically_known_true(num_rows <= most)


def stored_linear(
    x: Tensor, w: Tensor, scale: Tensor | None, bias: Tensor | None, format: str
) -> Tensor:
    """Computes a dense layer on CUDA tensors. Few rows are multiplied by quantized weights as they
    are stored, instead of by a dequantized copy; the arguments are those of the formula `linear`.
    """
    rows = x.flatten(0, -2)
    count = rows.shape[0]
    if scale is None or count == 0 or not reads_stored(count, 1):
        return linear(x, w, scale, bias, format)
    # Made on the device: a copy from the host would wait, and could not be captured in a graph.
    offsets = torch.arange(0, count + 1, count, dtype=torch.int32, device=x.device)
    own_bias = None if bias is None else bias[None]
    y = torch.ops.moe_ops.grouped_gemm_quantized(
        rows, w[None], scale[None], offsets, format, own_bias
    )
    return y.unflatten(0, x.shape[:-1])


def _check_part(
    op: str, part: str, t: Tensor, dtype: torch.dtype, shape: Sequence[int], name: str
) -> None:
    check(
        t.dtype == dtype and tuple(t.shape) == tuple(shape),
        f"{op}: {part} must be {dtype_name(dtype)} {list(shape)} for {name}, got "
        f"{dtype_name(t.dtype)} of shape {list(t.shape)}.",
    )


def check_given(op: str, part: str, t: Tensor | None, wanted: bool, name: str) -> None:
    got = "None" if t is None else f"shape {list(t.shape)}"
    check(
        (t is not None) == wanted,
        f"{op}: {part} must {'be given' if wanted else 'be None'} for {name}, got {got}.",
    )


def check_weight(
    op: str, what: str, w: Tensor, scale: Tensor, zero: Tensor | None, name: str, dims: int = 3
) -> int:
    """Checks a weight [E, O, D], or [O, D] (dims 2), of the format `name`; returns D."""
    how = check_name(op, name)
    row = how.row
    last = {8: "D]", 4: "D/2]", 6: "3D/4]"}[row.bits]
    check(
        w.dtype == row.dtype and w.dim() == dims,
        f"{op}: {what} must be {dtype_name(row.dtype)} {'[E, O, ' if dims == 3 else '[O, '}{last} "
        f"for {name}, got {dtype_name(w.dtype)} of shape {list(w.shape)}.",
    )
    *experts, features, stored = w.shape
    depth = stored * 8 // row.bits
    check(
        depth % how.multiple == 0 and how.packed_size(depth) == stored,
        f"{op}: {what} must have rows of a multiple of {how.multiple} weights for {name}, got "
        f"shape {list(w.shape)}.",
    )
    for part, (shape, dtype) in how.tensors(features, depth).items():
        if part == "_scale":
            _check_part(op, f"{what}_scale", scale, dtype, (*experts, *shape), name)
    check_given(op, f"{what}_zero", zero, how.zero_points, name)
    if zero is not None:
        shape = how.scale_shape(features, depth)
        _check_part(op, f"{what}_zero", zero, torch.uint8, (*experts, *shape), name)
    return depth


def check_dense(
    op: str,
    args: Mapping[str, Any],
    name: str,
    format: str,
    x: Tensor,
    features: int | None,
    depth: int,
) -> None:
    """Checks the dense layer `w_{name}` [features, depth] among the arguments of an op, of a format
    with `w_{name}_scale` or "float", in x's dtype, and `b_{name}` if the op has it. features None:
    any number."""
    what = f"w_{name}"
    w, scale = args[what], args[f"{what}_scale"]
    floats, how = format == _FLOAT, parse_format(format)
    check(
        floats or (how is not None and how.has_kernels),
        f"{op}: formats must have 'float', 'int8' or 'int4 g32', 'int4 g64' or 'int4 g128' for "
        f"{what}, got '{format}'.",
    )
    check_given(op, f"{what}_scale", scale, not floats, format)
    if floats:
        check_like(op, what, w, "x", x, "[O, K]", K=depth)
    else:
        check_dtype(op, "x", x.dtype, NARROW_FLOATS, f" for {format}")
        found = check_weight(op, what, w, scale, None, format, 2)
        check(
            found == depth,
            f"{op}: {what} must have rows of {depth} weights, got {found} (shape {list(w.shape)}).",
        )
    if features is not None:
        check_size(op, what, w, 0, features, "the number of features")
    check_like(op, f"b_{name}", args.get(f"b_{name}"), "x", x, "[O]", O=w.shape[0])

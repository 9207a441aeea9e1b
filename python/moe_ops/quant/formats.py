"""Conversion of weights into the formats that `quantize` makes, and out of any format.

Letters: E experts, O output features, D input features of a weight [..., O, D], G group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.formulas.codes import dequantized
from moe_ops.ops._checks import dtype_name
from moe_ops.weight_formats import GROUP_SIZES, WeightFormat, split_formats

from .config import config_named
from .fp8 import quantize_fp8_blocks

WEIGHTS = ("w_gate_up", "w_down")  # of experts
_PIECE = 2**17  # Numbers that are rounded at a time: 512 KiB in fp32.


def quantize_weight(w: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Rounds a weight to the nearest representable numbers.

    int8: w = q * scale[o], one scale an output feature, amax / 127; q in -127..127.
    int4: w = q * scale[o, k // G], one scale a group of G input features, q in -8..7. The largest
    number of a group in magnitude becomes exactly -8, so its scale has the opposite sign of it: the
    step is amax / 8 and not amax / 7, and what would be +8 is cut to 7.

    Args:
        w: [..., O, D], float; any strides.
        format: "int8", or "int4 g32", "int4 g64" or "int4 g128" with groups that divide D; or
            "fp8", as `quantize_fp8_blocks`.

    Returns:
        q: int8 [..., O, D], or uint8 [..., O, D/2]: byte j holds the number of k = 2j in its low
            half and that of k = 2j + 1 in its high half, each plus 8.
        scale: fp32 [..., O] or [..., O, D/G]. 0 where all numbers are 0.

    Raises:
        ValueError: another format, groups that do not divide D, a number that is not finite.
    """
    how = config_named("quantize_weight", format).format
    if how.name == "fp8":
        return quantize_fp8_blocks(w)
    group_size = how.group_size or 0
    if not w.is_floating_point() or w.dim() < 2:
        raise ValueError(
            f"quantize_weight: w must be a float tensor [..., O, D], got {dtype_name(w.dtype)} of "
            f"shape {list(w.shape)}."
        )
    check_divides("quantize_weight", "w", w.shape[-1], how)
    w = w.detach()
    rows = w.flatten(0, -2)
    if w.device.type != "cpu" or rows.numel() <= _PIECE:
        return _rounded(w, group_size)
    # Piece by piece: the passes over a piece find it in the cache.
    pieces = [_rounded(piece, group_size) for piece in rows.split(max(1, _PIECE // w.shape[-1]))]
    q, scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return q.unflatten(0, w.shape[:-1]), scale.unflatten(0, w.shape[:-1])


def _rounded(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    w = w.to(torch.float32, copy=True)
    if not group_size:
        scale = _checked(w.abs().amax(-1)) / 127
        return _divide(w, scale).clamp_(-127, 127).to(torch.int8), scale
    groups = w.unflatten(-1, (-1, group_size))  # [..., O, D/G, G]
    low, high = groups.amin(-1), groups.amax(-1)  # Many times faster than aminmax.
    scale = _checked(torch.where(high > -low, high, low)) / -8
    q = _divide(groups, scale).clamp_(-8, 7).add_(8).to(torch.uint8).flatten(-2)
    return q[..., 0::2] | (q[..., 1::2] << 4), scale


def dequantize_weight(
    q: Tensor, scale: Tensor, format: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns the weight [..., O, D] that `q` and `scale` stand for, without zero points.

    Args:
        q, scale: as `quantize_weight` returns them, or those of another format.
        format: its name.
        dtype: of the result; products are in fp64 for fp64, else in fp32.

    Raises:
        ValueError: dtypes or shapes that the format does not have.
    """
    how = format_named("dequantize_weight", format)
    check_pair("dequantize_weight", "q", q, scale, how)
    return dequantized(q, scale, format=format, dtype=dtype)


def formats_of(owner: str, format: str, sizes: tuple[int, int]) -> dict[str, WeightFormat]:
    """Returns the formats of w_gate_up and w_down, from their name or names, "q4_k, q6_k".

    Args:
        owner: who asks, for errors.
        format: the names.
        sizes: H and I, the input features of the two weights.

    Raises:
        ValueError: unknown names, or sizes that their groups do not divide.
    """
    names = split_formats(format, 2)
    if names is None:
        raise ValueError(f"{owner}: format must be one name or two, got {format!r}.")
    found = {}
    for weight, name, size in zip(WEIGHTS, names, sizes, strict=True):
        how = format_named(owner, name)
        check_divides(owner, weight, size, how)
        found[weight] = how
    return found


def format_named(owner: str, name: str) -> WeightFormat:
    """Returns the format of a name; raises ValueError, with the sentence of `owner`, for others."""
    try:
        return WeightFormat.from_label(name)
    except ValueError as error:
        raise ValueError(f"{owner}: {str(error).removeprefix('WeightFormat: ')}") from None


def check_divides(owner: str, what: str, in_features: int, how: WeightFormat) -> None:
    if in_features % how.multiple == 0:
        return
    advice = ""
    if how.name == "int4":
        fitting = [f"g{g}" for g in GROUP_SIZES if in_features % g == 0]
        advice = f"; use int4 {' or '.join(fitting)}" if fitting else "; use int8"
    raise ValueError(
        f"{owner}: the input features of {what} must be a multiple of {how.multiple} for "
        f"{how.label}, got {in_features}{advice}."
    )


def check_pair(owner: str, what: str, q: Tensor, scale: Tensor, how: WeightFormat) -> None:
    """Raises ValueError where `q` and `scale` are no weight of the format."""
    row = how.row
    if q.dtype != row.dtype or q.dim() < 2:
        last = "D" if row.bits == 8 else "D/2" if row.bits == 4 else "3D/4"
        raise ValueError(
            f"{owner}: {what} must be {dtype_name(row.dtype)} [..., O, {last}] for {how.label}, "
            f"got {dtype_name(q.dtype)} of shape {list(q.shape)}."
        )
    *lead, features, stored = q.shape
    shape = (*lead, *how.scale_shape(features, stored * 8 // row.bits))
    if tuple(scale.shape) != shape or scale.dtype != how.scale_type:
        raise ValueError(
            f"{owner}: the scale of {what} must be {dtype_name(how.scale_type)} {list(shape)} for "
            f"{how.label}, got {dtype_name(scale.dtype)} of shape {list(scale.shape)}."
        )


def _checked(largest: Tensor) -> Tensor:
    # The largest number of a row or a group is NaN where one of them is.
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("quantize_weight: w must be finite, got infinities or NaNs.")
    return largest


def _divide(numbers: Tensor, scale: Tensor) -> Tensor:
    """Rounded quotients, in place. Where the scale is 0, or has underflowed to it, so are they."""
    return numbers.div_(torch.where(scale == 0, 1.0, scale)[..., None]).round_()

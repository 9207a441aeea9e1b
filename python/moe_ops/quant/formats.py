"""The two storage formats of quantised expert weights, and how numbers get into and out of them.

Letters: E experts, O output features, D input features of a weight [..., O, D], G group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.ops._checks import dtype_name

FORMATS = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)
# Divides the sizes of all published models that moe_ops.hf is tested with; 4.5 bits a weight.
DEFAULT_GROUP_SIZE = 64
_PIECE = 2**17  # Numbers that are rounded at a time: 512 KiB in fp32.


def quantize(w: Tensor, format: str, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Rounds a weight to the nearest representable numbers.

    int8: w = q * scale[o], one scale an output feature, amax / 127; q in -127..127.
    int4: w = q * scale[o, k // G], one scale a group of G input features, q in -8..7. The largest
    number of a group in magnitude becomes exactly -8, so its scale has the opposite sign of it: the
    step is amax / 8 and not amax / 7, and what would be +8 is cut to 7.

    Args:
        w: [..., O, D], float; any strides.
        format: "int8" or "int4".
        group_size: of int4: 32, 64 or 128, a divisor of D. None is 64.

    Returns:
        q: int8 [..., O, D], or uint8 [..., O, D/2]: byte j holds the number of k = 2j in its low
            half and that of k = 2j + 1 in its high half, each plus 8.
        scale: fp32 [..., O] or [..., O, D/G]. 0 where all numbers are 0.

    Raises:
        ValueError: an unknown format, a group size that does not fit, a number that is not finite.
    """
    group_size = check_format("quantize", format, group_size)
    if not w.is_floating_point() or w.dim() < 2:
        raise ValueError(
            f"quantize: w must be a float tensor [..., O, D], got {dtype_name(w.dtype)} of shape "
            f"{list(w.shape)}."
        )
    if format == "int4":
        check_divides("quantize", "w", w.shape[-1], group_size)
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


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [..., O, D] that `q` and `scale` stand for; the products are made in fp32.

    Args:
        q, scale: as `quantize` returns them.
        dtype: of the result; the products are made in fp64 for fp64.

    Raises:
        ValueError: types or shapes that do not belong together.
    """
    check_pair("dequantize", "q", q, scale)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if q.dtype == torch.int8:
        return (q.to(acc) * scale.to(acc)[..., None]).to(dtype)
    numbers = torch.stack([q & 15, q >> 4], -1).flatten(-2).to(acc).sub_(8)
    groups = numbers.unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.to(acc)[..., None]).flatten(-2).to(dtype)


def shapes(
    out_features: int, in_features: int, format: str, group_size: int | None
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Shapes of `q` and `scale` for one expert's weight [O, D]."""
    if format == "int8":
        return (out_features, in_features), (out_features,)
    assert group_size is not None
    return (out_features, in_features // 2), (out_features, in_features // group_size)


def storage_dtype(format: str) -> torch.dtype:
    return torch.int8 if format == "int8" else torch.uint8


def check_format(name: str, format: str, group_size: int | None) -> int:
    """The group size, 0 for int8; raises ValueError for what is no format."""
    if format not in FORMATS:
        raise ValueError(f"{name}: format must be 'int8' or 'int4', got {format!r}.")
    if format == "int8":
        if group_size is not None:
            raise ValueError(
                f"{name}: group_size must be None for int8, which has one scale an output "
                f"feature, got {group_size}."
            )
        return 0
    group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{name}: group_size must be 32, 64 or 128, got {group_size}.")
    return group_size


def check_divides(name: str, what: str, in_features: int, group_size: int) -> None:
    if in_features % group_size:
        fitting = [str(g) for g in GROUP_SIZES if in_features % g == 0]
        advice = f"group_size {' or '.join(fitting)}" if fitting else "int8"
        raise ValueError(
            f"{name}: the input features of {what} must be a multiple of group_size = "
            f"{group_size}, got {in_features}; use {advice}."
        )


def check_pair(name: str, what: str, q: Tensor, scale: Tensor) -> None:
    """Raises ValueError where `scale` is not the scale of a weight stored in `q`."""
    if q.dtype not in (torch.int8, torch.uint8) or q.dim() < 2:
        raise ValueError(
            f"{name}: {what} must be int8 [..., O, D] or uint8 [..., O, D/2], got "
            f"{dtype_name(q.dtype)} of shape {list(q.shape)}."
        )
    if q.dtype == torch.int8:
        fits = scale.shape == q.shape[:-1]
        wanted = str(list(q.shape[:-1]))
    else:
        size = 2 * q.shape[-1]
        fits = scale.shape[:-1] == q.shape[:-1] and any(
            scale.shape[-1] * g == size for g in GROUP_SIZES
        )
        wanted = f"{[*q.shape[:-1]]} and one of {size} / 32, 64 or 128"
    if not fits or scale.dtype != torch.float32:
        raise ValueError(
            f"{name}: the scale of {what} must be float32 {wanted}, got "
            f"{dtype_name(scale.dtype)} of shape {list(scale.shape)}."
        )


def _checked(largest: Tensor) -> Tensor:
    # The largest number of a row or a group is NaN where one of them is.
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("quantize: w must be finite, got infinities or NaNs.")
    return largest


def _divide(numbers: Tensor, scale: Tensor) -> Tensor:
    """Rounded quotients, in place. Where the scale is 0, or has underflowed to it, so are they."""
    return numbers.div_(torch.where(scale == 0, 1.0, scale)[..., None]).round_()

"""The storage formats of expert weights, and how numbers get into and out of the two that
`quantize_experts` makes.

Letters: E experts, O output features, D input features of a weight [..., O, D], G group size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._checks import dtype_name

FORMATS = ("int8", "int4")
# Formats of published checkpoints, which layers hold and ops compute with (moe_ffn_quantized).
STORED_FORMATS = (*FORMATS, "mxfp4", "fp8", "q4_k", "q6_k")
_SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Name -> bytes of codes and shape of the scales of 256 weights of a row.
_RECORDS = {"q4_k": (128, 16), "q6_k": (192, 18)}
_FP8_BLOCK = 128
WEIGHTS = ("w_gate_up", "w_down")  # of a bank
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


@dataclass(frozen=True)
class WeightFormat:
    """How one weight [O, D] is stored.

    Args:
        name: one of STORED_FORMATS.
        group_size: of int4, and of int8 with a scale for so many inputs; None of int8 is a scale a
            row. A multiple of 32 that divides D.
        scale_dtype: of the scales of int8 and int4: "float32", "bfloat16" or "float16".
        zero_points: of int4, whether groups have one; without, a code of 8 is zero.

    Raises:
        ValueError: an unknown name, or arguments that do not belong together.
    """

    name: str
    group_size: int | None = None
    scale_dtype: str = "float32"
    zero_points: bool = False

    def __post_init__(self) -> None:
        group, integers = self.group_size, self.name in FORMATS
        problem = None
        if self.name not in STORED_FORMATS:
            problem = f"format must be one of {', '.join(STORED_FORMATS)}, got {self.name!r}."
        elif self.scale_dtype not in _SCALE_DTYPES:
            problem = f"scale_dtype must be float32, bfloat16 or float16, got {self.scale_dtype!r}."
        elif not integers and (group is not None or self.zero_points):
            problem = f"group_size and zero_points must not be given for {self.name}."
        elif group is not None and (group < 32 or group % 32):
            problem = f"group_size must be a multiple of 32, got {group}."
        elif self.name == "int4" and group is None:
            problem = "group_size must be given for int4, got None."
        elif self.zero_points and self.name != "int4":
            problem = f"zero_points must be False for {self.name}, got True."
        elif self.name == "int8" and group is None and self.scale_dtype != "float32":
            problem = f"scale_dtype must be float32 for int8 by rows, got {self.scale_dtype}."
        if problem is not None:
            raise ValueError(f"WeightFormat: {problem}")

    @classmethod
    def from_label(cls, label: str) -> WeightFormat:
        """The format of a `label`.

        Raises:
            ValueError: no such format.
        """
        name, *rest = label.split(" ")
        options: dict[str, Any] = {}
        for part in rest:
            if part in _SCALE_DTYPES:
                options["scale_dtype"] = part
            elif part == "zero":
                options["zero_points"] = True
            elif part[:1] == "g" and part[1:].isdecimal():
                options["group_size"] = int(part[1:])
            else:
                raise ValueError(f"WeightFormat: label must be of a format, got {label!r}.")
        return cls(name, **options)

    @property
    def multiple(self) -> int:
        """What D must be a multiple of."""
        if self.name in _RECORDS:
            return 256
        return 32 if self.name == "mxfp4" else self.group_size or 1

    def tensors(
        self, out_features: int, in_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What a weight consists of: what is behind its name -> shape and type."""
        O, D = out_features, in_features
        if D % self.multiple:
            raise ValueError(
                f"WeightFormat: the input features must be a multiple of {self.multiple} for "
                f"{self.label}, got {D}."
            )
        if self.name == "fp8":
            blocks = (-(-O // _FP8_BLOCK), -(-D // _FP8_BLOCK))
            return {"": ((O, D), torch.float8_e4m3fn), "_scale": (blocks, torch.float32)}
        if self.name in _RECORDS:
            codes, record = _RECORDS[self.name]
            shape = (O, D // 256, record)
            return {"": ((O, D // 256 * codes), torch.uint8), "_scale": (shape, torch.uint8)}
        if self.name == "mxfp4":
            return {"": ((O, D // 2), torch.uint8), "_scale": ((O, D // 32), torch.uint8)}
        eight = self.name == "int8"
        groups: tuple[int, ...] = (O,) if self.group_size is None else (O, D // self.group_size)
        result = {
            "": ((O, D if eight else D // 2), torch.int8 if eight else torch.uint8),
            "_scale": (groups, _SCALE_DTYPES[self.scale_dtype]),
        }
        if self.zero_points:
            result["_zero"] = (groups, torch.uint8)
        return result

    @property
    def label(self) -> str:
        """ "int8", "int4 g64", "int4 g128 float16 zero", "mxfp4"."""
        parts = [self.name]
        if self.group_size is not None:
            parts.append(f"g{self.group_size}")
        if self.scale_dtype != "float32":
            parts.append(self.scale_dtype)
        return " ".join([*parts, *(["zero"] if self.zero_points else [])])

    @property
    def has_kernels(self) -> bool:
        """Whether products are of integers; other weights become floats in cache."""
        if self.name not in FORMATS or self.zero_points or self.scale_dtype != "float32":
            return False
        return self.group_size in ((None,) if self.name == "int8" else GROUP_SIZES)


def label_of_bank(formats: Mapping[str, WeightFormat]) -> str:
    """One label of both weights: "int4 g64", or "q4_k, down q6_k"."""
    up, down = (formats[name].label for name in WEIGHTS)
    return up if up == down else f"{up}, down {down}"


def options_of_label(label: str) -> dict[str, Any]:
    """The arguments of a bank's layer from a label of both weights.

    Raises:
        ValueError: no such formats.
    """
    first, _, last = label.partition(", down ")
    up, down = (WeightFormat.from_label(part) for part in (first, last or first))
    integers = [how for how in (up, down) if how.name in FORMATS]
    return {
        "format": up.name,
        "down_format": None if down.name == up.name else down.name,
        "group_size": next((how.group_size for how in integers if how.group_size), None),
        "scale_dtype": integers[0].scale_dtype if integers else "float32",
        "zero_points": any(how.zero_points for how in integers),
    }


def bank_formats(
    owner: str,
    format: str,
    down_format: str | None,
    group_size: int | None,
    scale_dtype: str,
    zero_points: bool,
) -> dict[str, WeightFormat]:
    """Formats of the two weights of a bank, from the arguments of its layer, `owner`."""
    plain = scale_dtype == "float32" and not zero_points and down_format is None
    if format in FORMATS and plain:
        how = WeightFormat(format, check_format(owner, format, group_size) or None)
        return dict.fromkeys(WEIGHTS, how)
    names = {format, down_format or format}
    if not names & set(FORMATS) and (group_size is not None or scale_dtype != "float32"):
        raise ValueError(
            f"{owner}: group_size and scale_dtype must not be given for {format}, got {group_size} "
            f"and {scale_dtype}."
        )
    result = {}
    for weight, name in zip(WEIGHTS, (format, down_format or format), strict=True):
        integers = name in FORMATS
        group = group_size if integers else None
        dtype = scale_dtype if integers else "float32"
        try:
            result[weight] = WeightFormat(name, group, dtype, zero_points and name == "int4")
        except ValueError as error:
            sentence = str(error).removeprefix("WeightFormat: ")
            raise ValueError(f"{owner}: {sentence}") from None
    return result


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

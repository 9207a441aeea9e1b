"""The formats of quantized weights: one table, which ops, layers, readers, documents and tests
read. `csrc/include/moe_ops/weight_format.h` has its counterpart in C++; a test compares them.

Letters: O output features, D input features of a weight [O, D], G group size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch

__all__ = ["FORMATS", "GROUP_SIZES", "Format", "WeightFormat", "parse_format", "split_formats"]

# Group sizes of int4 that have kernels of integers.
GROUP_SIZES = (32, 64, 128)
_SCALE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
}


class Format(NamedTuple):
    """A row of the table.

    bits: of a weight; below 8, values are packed into bytes of uint8.
    dtype: of the stored values.
    group: consecutive inputs that share a scale; 0: the name says it ("int4 g64").
    rows: consecutive outputs that share a scale.
    record: bytes of the scales of a group; 0: one number.
    head: bytes in front of the scales of a row.
    scales: the dtype of scales, "float" for one of float32, bfloat16 and float16.
    row_scales: whether the name may lack a group, which means one scale per output.
    zeros: whether groups may have zero points.
    layout, codec, kernels: words for the documents.
    """

    bits: int
    dtype: torch.dtype
    group: int
    rows: int
    record: int
    head: int
    scales: str
    row_scales: bool
    zeros: bool
    layout: str
    codec: str
    kernels: str


_DECODED = "weights decoded to float32"
_OR_HALF = ", or to bfloat16 for x of that type"
FORMATS = {
    "int8": Format(
        8, torch.int8, 0, 1, 0, 0, "float", True, False,
        "a byte per weight", "q * scale",
        "integer kernels",
    ),
    "int4": Format(
        4, torch.uint8, 0, 1, 0, 0, "float", False, True,
        "two per byte, the even input in the low half",
        "(code - 8) * scale, or (code - zero) * scale",
        "integer kernels",
    ),
    "mxfp4": Format(
        4, torch.uint8, 32, 1, 0, 0, "uint8", False, False,
        "two per byte, the even input in the low half", "e2m1 * 2^(scale - 127)",
        "integer kernels",
    ),
    "fp8": Format(
        8, torch.float8_e4m3fn, 128, 128, 0, 0, "float32", False, False,
        "a byte per weight", "e4m3 * scale",
        "fp8 kernels of moe_ffn_fp8; else " + _DECODED + _OR_HALF,
    ),
    "e4m3": Format(
        8, torch.float8_e4m3fn, 0, 1, 0, 0, "float", True, False,
        "a byte per weight", "e4m3 * scale",
        _DECODED + ", or with a scale per output to bfloat16 for x of that type",
    ),
    "q4_k": Format(
        4, torch.uint8, 256, 1, 16, 0, "uint8", False, False,
        "ggml's q4_K: 128 bytes of values per block, its 16 bytes of scales apart",
        "code * step - low", _DECODED,
    ),
    "q6_k": Format(
        6, torch.uint8, 256, 1, 18, 0, "uint8", False, False,
        "ggml's q6_K: 192 bytes of values per block, its 18 bytes of scales apart",
        "(code - 32) * scale", _DECODED,
    ),
    "nvfp4": Format(
        4, torch.uint8, 16, 1, 0, 4, "uint8", False, False,
        "two per byte, the even input in the low half",
        "e2m1 * e4m3 * the float32 of the row, the four bytes ahead of its scales",
        "integer kernels for up to 8 tokens per expert; else " + _DECODED + _OR_HALF,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class WeightFormat:
    """Storage format of one weight [O, D].

    Args:
        name: a key of FORMATS.
        group_size: of int4, and of int8 and e4m3 with a scale for so many inputs; None of these
            two is a scale per output. A multiple of 32 that divides D.
        scale_dtype: of the scales of int8, int4 and e4m3: "float32", "bfloat16" or "float16".
        zero_points: of int4, whether groups have one; without, a code of 8 is zero.

    Raises:
        ValueError: an unknown name, or arguments that do not belong together.
    """

    name: str
    group_size: int | None = None
    scale_dtype: str = "float32"
    zero_points: bool = False

    def __post_init__(self) -> None:
        group, row = self.group_size, FORMATS.get(self.name)
        problem = None
        if row is None:
            problem = f"format must be one of {', '.join(FORMATS)}, got {self.name!r}."
        elif self.scale_dtype not in ("float32", "bfloat16", "float16"):
            problem = f"scale_dtype must be float32, bfloat16 or float16, got {self.scale_dtype!r}."
        elif row.group and (group is not None or self.zero_points):
            problem = f"group_size and zero_points must not be given for {self.name}."
        elif row.group and self.scale_dtype != "float32":
            problem = f"scale_dtype must not be given for {self.name}, got {self.scale_dtype}."
        elif group is not None and (group < 32 or group % 32):
            problem = f"group_size must be a multiple of 32, got {group}."
        elif not row.group and group is None and not row.row_scales:
            problem = f"group_size must be given for {self.name}, got None."
        elif self.zero_points and not row.zeros:
            problem = f"zero_points must be False for {self.name}, got True."
        elif not row.group and group is None and self.scale_dtype != "float32":
            problem = (
                f"scale_dtype must be float32 for {self.name} by rows, got {self.scale_dtype}."
            )
        if problem is not None:
            raise ValueError(f"WeightFormat: {problem}")

    @classmethod
    def from_label(cls, label: str) -> WeightFormat:
        """Returns the format of a `label`.

        Raises:
            ValueError: no such format.
        """
        name, *rest = label.split(" ")
        group = dtype = None
        if rest and rest[0][:1] == "g" and rest[0][1:].isdecimal() and len(rest[0]) <= 10:
            group = int(rest.pop(0)[1:])
        if rest and rest[0] in _SCALE_DTYPES:
            dtype = rest.pop(0)
        found = cls(name, group, dtype or "float32", rest == ["zero"])
        if found.label != label:
            raise ValueError(f"WeightFormat: label must be of a format, got {label!r}.")
        return found

    @cached_property
    def label(self) -> str:
        """ "int8", "int4 g64", "int4 g128 float16 zero", "mxfp4"."""
        parts = [self.name]
        if self.group_size is not None:
            parts.append(f"g{self.group_size}")
        if self.scale_dtype != "float32":
            parts.append(self.scale_dtype)
        return " ".join([*parts, *(["zero"] if self.zero_points else [])])

    @property
    def row(self) -> Format:
        return FORMATS[self.name]

    @property
    def multiple(self) -> int:
        """Returns what D must be a multiple of. Scales of fp8 may be of a part of a block."""
        row = self.row
        return 1 if row.rows > 1 else self.group_size or row.group or 1

    @cached_property
    def has_kernels(self) -> bool:
        """True if products are of integers on every device. On the CPU, all int8, int4, mxfp4 and
        nvfp4 weights are multiplied as integers, too; others become floats on the way."""
        if self.zero_points or self.scale_dtype != "float32":
            return False
        if self.name == "int8":
            return self.group_size is None
        return self.name == "int4" and self.group_size in GROUP_SIZES

    @property
    def scale_type(self) -> torch.dtype:
        row = self.row
        return _SCALE_DTYPES[self.scale_dtype if row.scales == "float" else row.scales]

    def packed_size(self, in_features: int) -> int:
        """Returns the stored elements of a row of D weights."""
        return in_features * self.row.bits // 8

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Returns the shape of the scales of a weight [O, D]."""
        row = self.row
        group = self.group_size or row.group
        shape: tuple[int, ...] = (-(-out_features // row.rows),)
        if group:
            shape = (*shape, row.head - (-in_features // group))
        return (*shape, row.record) if row.record else shape

    def tensors(
        self, out_features: int, in_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns what a weight consists of: what is behind its name -> shape and dtype.

        Raises:
            ValueError: D is not a multiple of `multiple`.
        """
        if in_features % self.multiple:
            raise ValueError(
                f"WeightFormat: the input features must be a multiple of {self.multiple} for "
                f"{self.label}, got {in_features}."
            )
        scales = self.scale_shape(out_features, in_features)
        result = {
            "": ((out_features, self.packed_size(in_features)), self.row.dtype),
            "_scale": (scales, self.scale_type),
        }
        if self.zero_points:
            result["_zero"] = (scales, torch.uint8)
        return result


@cache
def parse_format(label: str) -> WeightFormat | None:
    """Returns the format of a label, or None where there is none."""
    try:
        return WeightFormat.from_label(label)
    except ValueError:
        return None


def split_formats(names: str, count: int) -> tuple[str, ...] | None:
    """Returns the names of `count` weights in "int4 g64", which is for all of them, or in
    "q4_k, q6_k"; None where there is another number of names."""
    parts = tuple(names.split(", "))
    if len(parts) == 1:
        return parts * count
    return parts if len(parts) == count else None


def joined_label(formats: Mapping[str, WeightFormat]) -> str:
    """Returns the label of several weights: "int4 g64", or "q4_k, q6_k"."""
    labels = [how.label for how in formats.values()]
    return labels[0] if len(set(labels)) == 1 else ", ".join(labels)

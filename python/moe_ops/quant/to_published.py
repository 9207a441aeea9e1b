"""Stored weights turned to the layouts of published checkpoints, the inverse of
:mod:`moe_ops.quant.published`: the same codes, and scales of 16 bits where a layout has only those.

A weight is [O, D]: O output and D input features; g is the size of a group. Functions take one
weight, or several with leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.codes import dequantized
from moe_ops.weight_formats import WeightFormat

from .published import StoredWeight

# ggml's types that hold a format of ours with the same codes, and the inputs of a block.
GGML_TYPES = {"int4": "Q4_0", "int8": "Q8_0", "mxfp4": "MXFP4", "q4_k": "Q4_K", "q6_k": "Q6_K"}
_BLOCK = 32


def decoded(weight: StoredWeight) -> Tensor:
    """Returns the weight as float32."""
    how = weight.format.label
    return dequantized(weight.codes, weight.scale, weight.zero, format=how, dtype=torch.float32)


def select_rows(weight: StoredWeight, rows: Any) -> StoredWeight:
    """Returns some output features of a weight [O, D].

    Args:
        weight: of a format whose outputs have scales of their own: any but fp8.
        rows: a slice or an index.
    """
    zero = None if weight.zero is None else weight.zero[rows]
    return StoredWeight(weight.format, weight.codes[rows], weight.scale[rows], zero)


def ggml_type_of(how: WeightFormat) -> str | None:
    """Returns the type of ggml that holds a format with the same codes; None without one."""
    if how.zero_points or (how.group_size or _BLOCK) % _BLOCK:
        return None
    return GGML_TYPES.get(how.name)


def to_ggml(weight: StoredWeight) -> Tensor:
    """Returns blocks of `ggml_type_of`: uint8 [O, bytes of a row], the inverse of `from_ggml`.

    Scales of int4 and int8 are rounded to float16 and repeated for each 32 inputs.

    Raises:
        ValueError: no type has these codes, or a scale is too large for float16.
    """
    how = weight.format
    kind = ggml_type_of(how)
    if kind is None:
        raise ValueError(f"to_ggml: format must have a type of ggml, got {how.label}.")
    if kind in ("Q4_K", "Q6_K"):
        blocks = weight.codes.unflatten(-1, (weight.scale.shape[-2], -1))
        parts = (weight.scale, blocks) if kind == "Q4_K" else (blocks, weight.scale)
        return torch.cat(parts, -1).flatten(-2)
    if kind == "Q8_0":
        codes = weight.codes.unflatten(-1, (-1, _BLOCK)).view(torch.uint8)
    else:
        # 16 bytes: the first 16 codes low, the others high.
        low, high = weight.codes & 15, weight.codes >> 4
        nibbles = torch.stack((low, high), -1).flatten(-2).unflatten(-1, (-1, 2, _BLOCK // 2))
        codes = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    if kind == "MXFP4":
        return torch.cat((weight.scale.unsqueeze(-1), codes), -1).flatten(-2)
    scale = weight.scale if how.group_size is not None else weight.scale.unsqueeze(-1)
    scale = scale.repeat_interleave(codes.shape[-2] // scale.shape[-1], -1)
    halves = _half("to_ggml", scale).unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat((halves, codes), -1).flatten(-2)


def to_gptq(weight: StoredWeight, group_size: int) -> dict[str, Tensor]:
    """Returns the tensors of a GPTQ weight (version 1) of 4 bits with zero points of 8, the inverse
    of `from_gptq`.

    Args:
        weight: int4 [O, D] without zero points; O and D are multiples of 8.
        group_size: divides that of the weight, whose scales are repeated.

    Raises:
        ValueError: another weight, or a scale too large for float16.
    """
    _check_int4("to_gptq", weight, group_size)
    scales = _half("to_gptq", _spread_scales(weight, group_size)).mT.contiguous()
    words = weight.codes.contiguous().view(torch.int32)  # Eight codes, the first one lowest.
    zeros = torch.full((scales.shape[0], scales.shape[1] // 8), 0x77777777, dtype=torch.int32)
    depth = weight.codes.shape[-1] * 2
    order = torch.arange(depth, dtype=torch.int32) // group_size
    return {
        "qweight": words.mT.contiguous(),
        "qzeros": zeros,
        "scales": scales,
        "g_idx": order,
    }


def to_compressed_tensors(weight: StoredWeight, group_size: int | None) -> dict[str, Tensor]:
    """Returns the tensors of a weight [O, D] of compressed-tensors: pack-quantized for int4, whose
    scales keep their type, and int-quantized for int8.

    Args:
        weight: int4 without zero points, or int8 with a scale per output.
        group_size: of int4: divides that of the weight, whose scales are repeated.

    Raises:
        ValueError: another weight.
    """
    how = weight.format
    if how.name == "int8" and how.group_size is None:
        scale = weight.scale.unsqueeze(-1)
        return {"weight": weight.codes.contiguous(), "weight_scale": scale.contiguous()}
    assert group_size is not None
    _check_int4("to_compressed_tensors", weight, group_size)
    shape = (weight.codes.shape[0], weight.codes.shape[1] * 2)
    return {
        "weight_packed": weight.codes.contiguous().view(torch.int32),
        "weight_scale": _spread_scales(weight, group_size).contiguous(),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }


def is_plain_int4(how: WeightFormat, group_size: int) -> bool:
    """Returns whether a format is int4 without zero points, in groups of a multiple of
    `group_size`."""
    return how.name == "int4" and not how.zero_points and (how.group_size or 1) % group_size == 0


def _check_int4(owner: str, weight: StoredWeight, group_size: int) -> None:
    if not is_plain_int4(weight.format, group_size):
        raise ValueError(
            f"{owner}: weight must be int4 without zero points in groups of a multiple of "
            f"{group_size}, got {weight.format.label}."
        )


def _spread_scales(weight: StoredWeight, group_size: int) -> Tensor:
    assert weight.format.group_size is not None
    return weight.scale.repeat_interleave(weight.format.group_size // group_size, -1)


def _half(owner: str, scale: Tensor) -> Tensor:
    half = scale.half()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(
            f"{owner}: scales must be finite in float16, got {float(scale.abs().max())}."
        )
    return half

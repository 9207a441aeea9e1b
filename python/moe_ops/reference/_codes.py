"""Values of expert weights, in all formats that moe_ffn_quantized takes.

Letters: E experts, O output and D input features of a weight, G group size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dequantized", "formats_of"]

_FP8_BLOCK = 128
# e2m1: sign, two exponent bits, one mantissa bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantized(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    format: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns [..., O, D] in `dtype` of a weight of the format `format`, "int4 g64" for instance;
    None is the dtype of floating scales, or float32."""
    if dtype is None:
        dtype = scale.dtype if scale.is_floating_point() else torch.float32
    kind, _, more = format.partition(" ")
    if kind in ("int8", "e4m3") and not more:
        return w.to(dtype) * scale.to(dtype)[..., None]
    if kind in ("int8", "e4m3"):
        return _scaled(w.to(dtype), scale.to(dtype))
    if kind == "fp8":
        factors = scale.to(dtype).repeat_interleave(_FP8_BLOCK, -2)[..., : w.shape[-2], :]
        return w.to(dtype) * factors.repeat_interleave(_FP8_BLOCK, -1)[..., : w.shape[-1]]
    if kind == "q4_k":
        return _q4_k(w, scale, dtype)
    if kind == "q6_k":
        return _q6_k(w, scale, dtype)
    codes = torch.stack([w & 15, w >> 4], -1).flatten(-2)
    if kind in ("mxfp4", "nvfp4"):
        table = torch.tensor(_E2M1, dtype=dtype, device=w.device)
        values = torch.where(codes < 8, 1.0, -1.0).to(dtype) * table[(codes & 7).int()]
        if kind == "nvfp4":  # The float32 of a row, then a number of e4m3 for each 16.
            factor = (
                scale[..., :4]
                .flatten()
                .clone()
                .view(torch.float32)
                .view(*scale.shape[:-1], 1)
                .to(dtype)
            )
            steps = scale[..., 4:].contiguous().view(torch.float8_e4m3fn).to(dtype)
            return _scaled(values, steps * factor)
        # 2^(e - 127); 255 is NaN.
        powers = torch.exp2(scale.to(torch.float64) - 127).masked_fill(scale == 255, torch.nan)
        return _scaled(values, powers.to(dtype))
    numbers = codes.to(torch.int8).to(dtype)
    if zero is None:
        return _scaled(numbers - 8, scale.to(dtype))
    groups = numbers.unflatten(-1, (scale.shape[-1], -1))
    return ((groups - zero.to(dtype)[..., None]) * scale.to(dtype)[..., None]).flatten(-2)


def formats_of(format: str | Sequence[str], count: int) -> list[str]:
    """Returns the formats of `count` weights: one name is that of all."""
    names = format.split(", ") if isinstance(format, str) else list(format)
    return names * count if len(names) == 1 else names


def _scaled(numbers: Tensor, scale: Tensor) -> Tensor:
    """Multiplies each group of the last dimension by its scale."""
    size = numbers.shape[-1] // max(scale.shape[-1], 1)
    groups = numbers.unflatten(-1, (scale.shape[-1], size))
    return (groups * scale[..., None]).flatten(-2)


def _float16(record: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    return record[..., first : first + 2].contiguous().view(torch.float16).squeeze(-1).to(dtype)


def _q4_k(w: Tensor, record: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes blocks of 256: step and low are d and dmin times 8 integers of 6 bits; w = code *
    step - low.

    Bytes 4 to 7 contain the low six bits of the first four steps, 8 to 11 those of the first four
    lows; the others have four bits in bytes 12 to 15 and two in the upper bits of the first eight.
    """
    s = record[..., 4:].int()
    first, second, rest = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    steps = torch.cat([first & 63, (rest & 15) | (first >> 6 << 4)], -1)
    lows = torch.cat([second & 63, (rest >> 4) | (second >> 6 << 4)], -1)
    steps = steps.to(dtype) * _float16(record, 0, dtype)[..., None]
    lows = lows.to(dtype) * _float16(record, 2, dtype)[..., None]
    blocks = w.unflatten(-1, (record.shape[-2], 4, 32))  # 32 bytes: the codes of 2 times 32 steps
    codes = torch.stack([blocks & 15, blocks >> 4], -2).flatten(-3, -2)  # [..., blocks, 8, 32]
    return (codes.to(dtype) * steps[..., None] - lows[..., None]).flatten(-3)


def _q6_k(w: Tensor, record: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes blocks of 256: 128 bytes of low halves, 64 of pairs of upper bits; 16 int8
    scales."""
    blocks = w.unflatten(-1, (record.shape[-2], 192))
    low = blocks[..., :128].unflatten(-1, (2, 2, 32))  # halves of the block, two runs of 32
    high = blocks[..., 128:].unflatten(-1, (2, 32))
    low = torch.cat([low & 15, low >> 4], -2)  # [..., 2, 4, 32]
    high = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], -2)
    codes = (low | high << 4).to(torch.int8) - 32
    scales = record[..., :16].view(torch.int8).to(dtype) * _float16(record, 16, dtype)[..., None]
    groups = codes.flatten(-3).unflatten(-1, (16, 16)).to(dtype)
    return (groups * scales[..., None]).flatten(-3)

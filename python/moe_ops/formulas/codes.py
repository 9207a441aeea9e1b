"""Dequantization of weights in every format of `moe_ffn_quantized`.

Letters: E experts, O output and D input features of a weight, G group size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.weight_formats import WeightFormat

# Rows and columns of a weight, or columns of a row of tokens, that share a scale in fp8.
FP8_BLOCK = 128
_FP8_MAX = 448.0
# As in the kernels: the scale of a block is at least 2^-126, the smallest normal fp32 number.
_MIN_AMAX = _FP8_MAX * 2.0**-126


def dequantized(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    format: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the weight [..., O, D] of the format `format` that codes, scales and zero points
    stand for.

    It is computed in float32 (float64 for float64) and rounded to `dtype` once; None is the dtype
    of floating-point scales, or float32.
    """
    if dtype is None:
        dtype = scale.dtype if scale.is_floating_point() else torch.float32
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    kind = WeightFormat.from_label(format)
    if kind.name == "int4":
        return _int4(w, scale.to(acc), zero).to(dtype)
    if kind.group_size is not None:
        return _scaled(w.to(acc), scale.to(acc)).to(dtype)
    return _DECODERS[kind.name](w, scale, acc).to(dtype)


def dequantized_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns rows [N, D] of fp8 values times one scale per 128 columns, in the dtype of
    `scale`."""
    return codes.to(scale.dtype) * _spread(scale, -1, codes.shape[-1])


def _spread(scale: Tensor, dim: int, size: int) -> Tensor:
    """Repeats each entry along `dim` for the 128 features of its block, up to `size` features."""
    block = torch.arange(size, device=scale.device).div_(FP8_BLOCK, rounding_mode="floor")
    return scale.index_select(dim, block)


def _fp8(w: Tensor, scale: Tensor, acc: torch.dtype) -> Tensor:
    factors = _spread(_spread(scale.to(acc), -1, w.shape[-1]), -2, w.shape[-2])
    return w.to(acc).mul_(factors)


def _by_rows(w: Tensor, scale: Tensor, acc: torch.dtype) -> Tensor:
    return w.to(acc).mul_(scale.to(acc).unsqueeze(-1))


def _int4(w: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Dequantizes int4, whose values are offset by 8, or by the zero point of their group."""
    numbers = _nibbles(w).to(scale.dtype)
    if zero is None:
        return _scaled(numbers.sub_(8), scale)
    groups = _grouped(numbers, scale.shape[-1]).sub_(zero.to(scale.dtype).unsqueeze(-1))
    return groups.mul_(scale.unsqueeze(-1)).flatten(-2)


def _doubled_e2m1(w: Tensor) -> Tensor:
    """Returns twice the E2M1 numbers in int8.

    A value has a sign, two exponent bits and one mantissa bit. Twice its magnitude is an integer:
    the mantissa with its leading bit (exponent zero has none), shifted by the exponent.
    """
    codes = _nibbles(w)
    exponent = codes >> 1 & 3
    doubled = (codes & 1 | exponent.clamp(max=1) << 1) << (exponent.clamp(min=1) - 1)
    return torch.where(codes < 8, doubled.view(torch.int8), -doubled.view(torch.int8))


def _nvfp4(w: Tensor, scale: Tensor, acc: torch.dtype) -> Tensor:
    """E2M1 numbers with a number of E4M3 per group and the float32 of the row ahead of these."""
    # A copy: where few rows are, a slice may be contiguous and have strides that no float has.
    head = scale[..., :4].clone(memory_format=torch.contiguous_format).view(torch.float32).to(acc)
    steps = scale[..., 4:].contiguous().view(torch.float8_e4m3fn).to(acc)
    return _scaled(_doubled_e2m1(w).to(acc), steps.mul_(head.mul_(0.5)))


def _mxfp4(w: Tensor, scale: Tensor, acc: torch.dtype) -> Tensor:
    """E2M1 numbers with a power of two per group."""
    numbers = _doubled_e2m1(w)
    # Scales are the exponents of float32 as they are stored. The lowest is 2^-127, which float32
    # has as a subnormal number, and the highest is NaN, as which float32 reads it with a mantissa.
    bits = scale.to(torch.int32) << 23
    bits = bits.masked_fill_(scale == 0, 1 << 22).masked_fill_(scale == 255, 0x7FC00000)
    # The division by 2 comes first: half of 2^-127 would be rounded by hardware that flushes
    # subnormal numbers.
    return _scaled(numbers.to(acc).mul_(0.5), bits.view(torch.float32).to(acc))


def _q4_k(w: Tensor, record: Tensor, acc: torch.dtype) -> Tensor:
    """Dequantizes blocks of 256 weights, in eight runs of 32: `code * step - low`.

    A record contains the float16 factors of steps and lows, then twelve bytes: four with the low
    six bits of the first steps, four with those of the first lows, four with the low four bits of
    the other steps (lower half) and lows (upper half), whose upper two bits are the top bits of the
    first eight bytes.
    """
    first_steps, first_lows, others = record[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    steps = torch.cat((first_steps & 63, first_steps >> 6 << 4 | others & 15), -1)
    lows = torch.cat((first_lows & 63, first_lows >> 6 << 4 | others >> 4), -1)
    factors = record[..., :4].contiguous().view(torch.float16).to(acc)
    steps, lows = steps.to(acc).mul_(factors[..., :1]), lows.to(acc).mul_(factors[..., 1:])
    # 32 bytes contain the codes of two runs, the first in their lower halves.
    pairs = w.unflatten(-1, (record.shape[-2], 4, 32))
    codes = torch.stack((pairs & 15, pairs >> 4), -2).flatten(-3, -2)
    return codes.to(acc).mul_(steps.unsqueeze(-1)).sub_(lows.unsqueeze(-1)).flatten(-3)


def _q6_k(w: Tensor, record: Tensor, acc: torch.dtype) -> Tensor:
    """Dequantizes blocks of 256 weights, in sixteen runs of 16: `(code - 32) * factor * step`.

    A record contains sixteen int8 steps and a float16 factor. In each half of a block, 64 bytes
    contain the low four bits of 128 codes and 32 other bytes the upper two bits, of four weights
    each, 32 apart.
    """
    blocks = w.unflatten(-1, (record.shape[-2], 192))
    low = _halves_of(blocks[..., :128].unflatten(-1, (2, 1, 64))).unflatten(-1, (2, 32))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=w.device).unsqueeze(-1)
    high = blocks[..., 128:].unflatten(-1, (2, 1, 32)) >> shifts & 3
    codes = (low.flatten(-3, -2) | high << 4).flatten(-3).unflatten(-1, (16, 16))
    factor = record[..., 16:18].contiguous().view(torch.float16).to(acc)
    steps = record[..., :16].contiguous().view(torch.int8).to(acc).mul_(factor)
    return codes.to(acc).sub_(32).mul_(steps.unsqueeze(-1)).flatten(-3)


_DECODERS: dict[str, Callable[[Tensor, Tensor, torch.dtype], Tensor]] = {
    "fp8": _fp8,
    "e4m3": _by_rows,
    "int8": _by_rows,
    "mxfp4": _mxfp4,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
    "nvfp4": _nvfp4,
}


def _nibbles(w: Tensor) -> Tensor:
    """Returns the two codes of each byte next to each other, the lower half first."""
    return torch.stack((w & 15, w >> 4), -1).flatten(-2)


def _halves_of(w: Tensor) -> Tensor:
    """Returns [..., 2, D] from bytes [..., 1, D]: all lower halves, then all upper halves."""
    return torch.cat((w & 15, w >> 4), -2)


def _grouped(numbers: Tensor, groups: int) -> Tensor:
    return numbers.unflatten(-1, (groups, numbers.shape[-1] // max(groups, 1)))


def _scaled(numbers: Tensor, scale: Tensor) -> Tensor:
    """Multiplies each group of the last dimension by its scale, in place."""
    return _grouped(numbers, scale.shape[-1]).mul_(scale.unsqueeze(-1)).flatten(-2)


# Experts whose numbers are at most so many together are rounded at once; fp32 copies take memory.
_ROUNDED_AT_ONCE = 1 << 24


def round_fp8_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight [..., O, D] as `moe_ops.quant.quantize_fp8_blocks` does, without waiting for
    the device: a block with a NaN or an infinity gets the scale NaN and codes NaN."""
    matrix = w.shape[-2] * w.shape[-1]
    if w.dim() == 3 and w.numel() > _ROUNDED_AT_ONCE and w.shape[0] > 1:
        parts = w.split(max(1, _ROUNDED_AT_ONCE // matrix))
        codes, scales = zip(*(_round_at_once(part) for part in parts), strict=True)
        joined = torch.cat([c.view(torch.uint8) for c in codes])
        return joined.view(torch.float8_e4m3fn), torch.cat(scales)
    return _round_at_once(w)


def _round_at_once(w: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _fp8_blocks(w.float())  # [..., O/128, 128, D/128, 128]
    amax = blocks.abs().amax((-3, -1))
    finite = amax.isfinite()
    amax = torch.where(finite, amax.clamp(min=_MIN_AMAX), torch.nan)
    full = torch.full_like(amax, _FP8_MAX)
    codes = (blocks * (full / amax)[..., :, None, :, None]).to(torch.float8_e4m3fn)
    codes = codes.flatten(-4, -3).flatten(-2)[..., : w.shape[-2], : w.shape[-1]]
    return codes.contiguous(), amax / full


def _fp8_blocks(w: Tensor) -> Tensor:
    rows, columns = w.shape[-2:]
    padded = F.pad(w, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    size = (padded.shape[-2] // FP8_BLOCK, FP8_BLOCK, padded.shape[-1] // FP8_BLOCK, FP8_BLOCK)
    return padded.reshape(*w.shape[:-2], *size)

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# A block's largest magnitude counts as at least this; its scale is then a normal fp32 number.
MIN_AMAX = FP8_MAX * 2.0**-126


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D] to codes [N, D] and scales [N, ceil(D / 128)]; always in fp32, whatever x is."""
    blocks = _blocks(x.float())  # [N, D/128, 128]
    amax = blocks.abs().amax(2)
    size = amax.clamp(min=MIN_AMAX)
    # Tensors on both sides: torch takes a number over a tensor as a product with its inverse.
    full = torch.full_like(size, FP8_MAX)
    scale = torch.where(amax.isfinite(), size / full, torch.nan)
    codes = torch.where(amax.isfinite()[..., None], blocks * (full / size)[..., None], torch.nan)
    return codes.to(FP8).flatten(1)[:, : x.shape[1]], scale


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """Codes [N, D] times scales [N, ceil(D / 128)], in the type of `scale`."""
    return q.to(scale.dtype) * scale.repeat_interleave(BLOCK, 1)[:, : q.shape[1]]


def _blocks(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK))
    return padded.view(x.shape[0], padded.shape[1] // BLOCK, BLOCK)

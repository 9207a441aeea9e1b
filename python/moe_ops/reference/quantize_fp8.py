from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["quantize_fp8", "quantize_fp8_columns"]

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# A block's largest magnitude is clamped to at least this; its scale is then a normal fp32 number.
MIN_AMAX = FP8_MAX * 2.0**-126


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes x [N, D] to values [N, D] and scales [N, ceil(D / 128)]; always in fp32, whatever x
    is."""
    blocks = _blocks(x.float())  # [N, D/128, 128]
    amax = blocks.abs().amax(2)
    size = amax.clamp(min=MIN_AMAX)
    # Tensors on both sides: torch computes a number over a tensor as a product with the inverse.
    full = torch.full_like(size, FP8_MAX)
    scale = torch.where(amax.isfinite(), size / full, torch.nan)
    codes = torch.where(amax.isfinite()[..., None], blocks * (full / size)[..., None], torch.nan)
    return codes.to(FP8).flatten(1)[:, : x.shape[1]], scale


def quantize_fp8_columns(
    x: Tensor,
    expert_offsets: Tensor,
    row_to_slot: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantizes x [N, D] to values [D, 128 G] and scales [G, D]: every 128 rows of an expert,
    transposed."""
    rows = x.float()
    if row_to_slot is not None:
        slot = row_to_slot.long()
        rows = rows[slot // max(len(slot) // max(len(x), 1), 1)]
        if topk_weights is not None:
            rows = rows * topk_weights.float().flatten()[slot, None]
    offsets = expert_offsets.tolist()
    groups = len(rows) // BLOCK + len(offsets) - 1
    columns = rows.new_zeros(x.shape[1], groups * BLOCK)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        first = BLOCK * (begin // BLOCK + expert)
        columns[:, first : first + end - begin] = rows[begin:end].T
    codes, scale = quantize_fp8(columns)
    return _without_padding(codes, offsets), scale.T.contiguous()


def _without_padding(codes: Tensor, offsets: list[int]) -> Tensor:
    """Zeros the columns of groups without a row: in a group with a NaN, they are NaN too."""
    filled = torch.zeros(codes.shape[1], dtype=torch.bool, device=codes.device)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        first = BLOCK * (begin // BLOCK + expert)
        filled[first : first + end - begin] = True
    bits = torch.where(filled, codes.view(torch.uint8), 0)
    return bits.view(FP8)


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """Multiplies quantized values [N, D] by scales [N, ceil(D / 128)], in the dtype of `scale`."""
    return q.to(scale.dtype) * scale.repeat_interleave(BLOCK, 1)[:, : q.shape[1]]


def _blocks(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK))
    return padded.view(x.shape[0], padded.shape[1] // BLOCK, BLOCK)

from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype
from .grouped_gemm import grouped_gemm
from .quantize_fp8 import BLOCK


def grouped_gemm_fp8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """grouped_gemm block by block of k: products of codes, then scales, then the sum over blocks.

    In the type of the scales. The rows are summed from all 128-blocks of k in order.
    """
    acc = acc_dtype(a_scale.dtype)
    out = torch.zeros(a.shape[0], b.shape[1], dtype=acc, device=a.device)
    for block in range(a_scale.shape[1]):
        k = slice(block * BLOCK, (block + 1) * BLOCK)
        column = b_scale[:, :, block].to(acc).repeat_interleave(BLOCK, 1)[:, : b.shape[1]]  # [E, O]
        scaled = b[:, :, k].to(acc) * column[:, :, None]
        part = grouped_gemm(a[:, k].to(acc), scaled, expert_offsets)
        out = out + part * a_scale[:, block, None].to(acc)
    end = int(expert_offsets[-1])
    if bias is not None:
        counts = expert_offsets.diff().long()
        out[:end] = out[:end] + bias.to(acc).repeat_interleave(counts, 0)
    # Scales of rows without an expert may be anything.
    out[end:] = 0
    return out.to(out_dtype)

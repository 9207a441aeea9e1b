from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ._common import acc_dtype
from .grouped_gemm import grouped_gemm
from .quantize_fp8 import BLOCK

__all__ = ["grouped_gemm_fp8", "grouped_gemm_fp8_wgrad"]


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
    """Computes grouped_gemm block by block of k: products of fp8 values, then scales, then the sum
    over blocks.

    It computes in the dtype of the scales, and sums the 128-blocks of k in order.
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
    # Scales of rows without an expert may be arbitrary.
    out[end:] = 0
    return out.to(out_dtype)


def grouped_gemm_fp8_wgrad(
    grad: Tensor,
    grad_scale: Tensor,
    a: Tensor,
    a_scale: Tensor,
    expert_offsets: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Multiplies grad [O, 128 G] and a [K, 128 G], group by group of each expert: products of fp8
    values, then scales, then the sum over groups, in the dtype of the scales; adds to main_grad in
    place."""
    acc = acc_dtype(a_scale.dtype)
    spans = list(itertools.pairwise(expert_offsets.tolist()))
    out = torch.zeros(len(spans), grad.shape[0], a.shape[0], dtype=acc, device=a.device)
    for expert, (begin, end) in enumerate(spans):
        first = begin // BLOCK + expert
        for group in range(first, first + -(-(end - begin) // BLOCK)):
            c = slice(group * BLOCK, group * BLOCK + BLOCK)
            part = grad[:, c].to(acc) @ a[:, c].to(acc).T
            out[expert] += part * grad_scale[group, :, None].to(acc) * a_scale[group].to(acc)
    if main_grad is None:
        return out.to(out_dtype)
    return main_grad.copy_(main_grad.to(acc) + out)

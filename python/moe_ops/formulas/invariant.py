"""GEMMs that replace cuBLAS in CUDA formulas in batch-invariant mode: cuBLAS selects an algorithm
by the number of rows, and torch's sums do so by all sizes."""

from __future__ import annotations

import torch
from torch import Tensor


def batched_products(a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes [E, T, O] from [E, T, D], [E, O, D] and [E, O], below autograd."""
    num_experts, num_tokens, _ = a.shape
    offsets = torch.arange(num_experts + 1, device=a.device) * num_tokens
    y: Tensor = torch.ops.moe_ops.grouped_gemm(a.flatten(0, 1), w, offsets, bias)
    return y.view(num_experts, num_tokens, w.shape[1])


def row_sums(x: Tensor) -> Tensor:
    """Sums rows: [T, D] in the accumulation dtype to [T], below autograd."""
    return batched_products(x[None], x.new_ones((1, 1, x.shape[1])))[0, :, 0]

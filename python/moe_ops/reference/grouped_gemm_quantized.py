from __future__ import annotations

from torch import Tensor

from ._codes import dequantized
from ._common import acc_dtype
from .grouped_gemm import grouped_gemm


def grouped_gemm_quantized(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
    *,
    format: str,
    bias: Tensor | None = None,
    b_zero: Tensor | None = None,
) -> Tensor:
    """Computes grouped_gemm with dequantized weights; a is not rounded."""
    acc = acc_dtype(a.dtype)
    weights = dequantized(b, b_scale, b_zero, format=format, dtype=acc)
    bias = None if bias is None else bias.to(acc)
    return grouped_gemm(a.to(acc), weights, expert_offsets, bias=bias).to(a.dtype)

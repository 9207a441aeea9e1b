from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ._common import acc_dtype

__all__ = ["grouped_gemm", "grouped_gemm_wgrad", "grouped_sum"]


def grouped_gemm(
    a: Tensor, b: Tensor, expert_offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """Multiplies rows of expert e by b[e] transposed: a [N, K], b [E, O, K] to [N, O]; tail rows
    are zero."""
    acc = acc_dtype(a.dtype)
    parts = []
    for e, (begin, end) in enumerate(_spans(expert_offsets)):
        part = a[begin:end].to(acc) @ b[e].to(acc).T
        parts.append(part if bias is None else part + bias[e].to(acc))
    tail = a.shape[0] - int(expert_offsets[-1])
    parts.append(torch.zeros(tail, b.shape[1], dtype=acc, device=a.device))
    return torch.cat(parts).to(a.dtype)


def grouped_gemm_wgrad(grad: Tensor, a: Tensor, expert_offsets: Tensor) -> Tensor:
    """Computes the gradient of `b`: grad [N, O], a [N, K] to [E, O, K]; empty experts get zeros."""
    acc = acc_dtype(a.dtype)
    parts = [
        grad[begin:end].to(acc).T @ a[begin:end].to(acc) for begin, end in _spans(expert_offsets)
    ]
    return torch.stack(parts).to(a.dtype)


def grouped_sum(rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """Sums each expert's rows: [N, O] to [E, O] (the gradient of `bias`)."""
    acc = acc_dtype(rows.dtype)
    parts = [rows[begin:end].to(acc).sum(0) for begin, end in _spans(expert_offsets)]
    return torch.stack(parts).to(rows.dtype)


def _spans(expert_offsets: Tensor):
    return itertools.pairwise(expert_offsets.tolist())

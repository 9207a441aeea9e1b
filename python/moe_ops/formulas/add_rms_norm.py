"""add_rms_norm: residual addition followed by RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.formulas.dtypes import accumulate_dtype
from moe_ops.formulas.invariant import row_sums
from moe_ops.numerics import is_batch_invariant_enabled


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Computes :func:`moe_ops.add_rms_norm`; differentiable in all tensors."""
    total = _total(x, residual, bias)
    if x.shape[-1] == 0:
        return total * weight, total
    return F.rms_norm(total, weight.shape, weight, eps), total


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the sum, and the reciprocal root mean square of each row, for `backward`."""
    total = _total(x, residual, bias)
    acc, size = accumulate_dtype(x.dtype), x.shape[-1]
    rows = total.to(acc).reshape(x.shape[:-1].numel() if size else 0, size)
    if is_batch_invariant_enabled() and x.numel() > 0:
        mean = row_sums(rows.square()) / size
    else:
        mean = rows.square().mean(-1)
    rstd = torch.rsqrt(mean + eps)
    y = (rows * rstd.unsqueeze(-1)).mul_(weight).to(x.dtype)
    return y.view(x.shape), total, rstd


def backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of x (and of a residual), weight and bias."""
    size, acc = sum.shape[-1], accumulate_dtype(sum.dtype)
    g, s = (t.to(acc).reshape(rstd.shape[0], size) for t in (grad_y, sum))
    normed = s * rstd[:, None]
    # y = normed w, and normed does not depend on the norm of s: the gradient along normed is
    # removed.
    u = g * weight.to(acc)
    grad = (u - normed * (u * normed).mean(-1, keepdim=True)) * rstd[:, None]
    if grad_sum is not None:
        grad = grad + grad_sum.to(acc).reshape(grad.shape)
    return (
        grad.to(sum.dtype).view(sum.shape) if need_x else None,
        (g * normed).sum(0).to(sum.dtype) if need_weight else None,
        grad.sum(0).to(sum.dtype) if need_bias else None,
    )


def _total(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns x + residual + bias, rounded to x's dtype once; returns x itself without either."""
    terms = [t for t in (residual, bias) if t is not None]
    total = x
    if terms:
        total = x.to(accumulate_dtype(x.dtype))
        for term in terms:
            total = total + term  # A narrow term is promoted.
    return total.to(x.dtype)

"""router_linear: logits of a router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.formulas.dtypes import accumulate_dtype
from moe_ops.formulas.invariant import batched_products
from moe_ops.numerics import is_batch_invariant_enabled


def router_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes :func:`moe_ops.router_linear`; differentiable unless batch-invariant."""
    dtype = logits_dtype or x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if is_batch_invariant_enabled():
        return batched_products(x[None], weight[None], None if bias is None else bias[None])[0]
    return F.linear(x, weight, bias)


def backward(
    grad_logits: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of x, weight and bias."""
    g, acc = grad_logits, accumulate_dtype(x.dtype)
    return (
        (g @ weight.to(g.dtype)).to(x.dtype) if need_x else None,
        (g.T @ x.to(g.dtype)).to(x.dtype) if need_weight else None,
        g.sum(0, dtype=acc).to(x.dtype) if need_bias else None,
    )

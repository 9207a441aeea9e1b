"""mix_expert_outputs: mixtures of all experts' outputs, with optional normalization and
activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.formulas.dtypes import accumulate_dtype
from moe_ops.numerics import is_batch_invariant_enabled

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def forward(
    outputs: Tensor,
    weights: Tensor,
    factor: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns y, and the mean and variance of the tokens if they were computed."""
    acc = accumulate_dtype(outputs.dtype)
    n, w = outputs.to(acc), weights.to(acc)
    batch = norm_weight is not None and mean is None
    if batch:
        mean, var = _statistics(n)
    if norm_weight is not None and norm_bias is not None and mean is not None and var is not None:
        n = torch.addcmul(norm_bias, n - mean, norm_weight * torch.rsqrt(var + eps))
    a = _act(n, activation)
    y = _in_order(w, a) if is_batch_invariant_enabled() else torch.bmm(w, a)
    if factor is not None and len(factor) > 0:
        tokens = y.unflatten(0, (len(factor), -1))
        y = (tokens * factor.to(acc).unsqueeze(1)).flatten(0, 1)
    return y.to(outputs.dtype), mean if batch else None, var if batch else None


def backward(
    grad_y: Tensor,
    outputs: Tensor,
    weights: Tensor,
    factor: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    activation: str,
    eps: float,
    batch: bool,
    need_weights: bool,
    need_factor: bool,
    need_norm_weight: bool,
    need_norm_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of outputs, weights, factor, norm_weight and norm_bias.

    `batch` is True if mean and var are those of the tokens, which have gradients.
    """
    dtype, acc = outputs.dtype, accumulate_dtype(outputs.dtype)
    g, w, n = (t.to(acc) for t in (grad_y, weights, outputs))
    rstd = normed = None
    if norm_weight is not None and norm_bias is not None and mean is not None and var is not None:
        rstd = torch.rsqrt(var + eps)
        normed = (n - mean) * rstd
        n = normed * norm_weight + norm_bias
    act, slope = _act_and_slope(n, activation)
    grad_weights = grad_factor = grad_norm_weight = grad_norm_bias = None
    if factor is not None and len(factor) > 0:
        shared = (len(factor), -1, *factor.shape[1:])
        if need_factor:
            grad_factor = (g * torch.bmm(w, act)).reshape(shared).sum(1).to(dtype)
        g = (g.reshape(shared) * factor.to(acc)[:, None]).reshape(g.shape)
    elif factor is not None and need_factor:
        grad_factor = torch.zeros_like(factor)
    if need_weights:
        grad_weights = torch.bmm(g, act.transpose(1, 2)).to(dtype)
    grad = torch.bmm(w.transpose(1, 2), g) * slope
    if normed is not None and rstd is not None and norm_weight is not None:
        if need_norm_weight:
            grad_norm_weight = (grad * normed).sum(0)
        if need_norm_bias:
            grad_norm_bias = grad.sum(0)
        if batch and len(grad) > 0:
            # The mean and variance of the tokens depend on each of them.
            grad = grad - grad.mean(0) - normed * (grad * normed).mean(0)
        grad = grad * norm_weight * rstd
    return grad.to(dtype), grad_weights, grad_factor, grad_norm_weight, grad_norm_bias


def _statistics(n: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and variance over tokens, without Bessel's correction; zeros without tokens."""
    if n.numel() == 0:
        return n.new_zeros(n.shape[1:]), n.new_zeros(n.shape[1:])
    var, mean = torch.var_mean(n, 0, correction=0)
    return mean, var


def _act(n: Tensor, activation: str) -> Tensor:
    return n if activation == "none" else _ACTIVATIONS[activation](n)


def _act_and_slope(n: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "relu":
        return F.relu(n), (n > 0).to(n.dtype)
    s = torch.sigmoid(n)
    if activation == "sigmoid":
        return s, s * (1 - s)
    if activation == "silu":
        return n * s, s * (1 + n * (1 - s))
    return n, torch.ones_like(n)


def _in_order(w: Tensor, a: Tensor) -> Tensor:
    """Computes w @ a one expert after another, because a GEMM's order depends on its sizes."""
    y = a.new_zeros((w.shape[0], w.shape[1], a.shape[2]))
    for e in range(a.shape[1]):
        y = y + w[:, :, e, None] * a[:, e, None]
    return y

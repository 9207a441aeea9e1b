from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import acc_dtype


def activated(
    outputs: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes act(normalized outputs) in the accumulation dtype, and the statistics if not
    given."""
    acc = acc_dtype(outputs.dtype)
    n = outputs.to(acc)
    batch_mean, batch_var = n.new_empty(0), n.new_empty(0)
    if norm_weight is not None and norm_bias is not None:
        if mean is None or var is None:
            mean = n.sum(0) / max(len(n), 1)
            var = (n - mean).square().sum(0) / max(len(n), 1)
            batch_mean, batch_var = mean.detach(), var.detach()
        n = (n - mean) / (var + eps).sqrt() * norm_weight + norm_bias
    act = {"none": lambda v: v, "relu": F.relu, "silu": F.silu, "sigmoid": torch.sigmoid}
    return act[activation](n), batch_mean, batch_var


def mix_expert_outputs(
    outputs: Tensor,
    weights: Tensor,
    *,
    factor: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes y[t, m] = sum_e weights[t, m, e] act(normalized outputs[t, e])."""
    norm = (norm_weight, norm_bias, mean, var)
    a, batch_mean, batch_var = activated(outputs, *norm, activation, eps)
    y = torch.einsum("tme,teo->tmo", weights.to(a.dtype), a)
    if factor is not None and len(factor) > 0:
        y = y * factor.to(a.dtype).repeat_interleave(len(y) // len(factor), 0)
    return y.to(outputs.dtype), batch_mean, batch_var

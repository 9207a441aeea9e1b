"""gated_mlp_decode: a dense gated MLP, with the norm before and the residual after it."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.formulas.activations import GATES
from moe_ops.formulas.dense_layer import Linear, linear, rms_norm
from moe_ops.formulas.dtypes import accumulate_dtype
from moe_ops.weight_formats import split_formats


def gated_mlp_decode(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    w_gate_scale: Tensor | None = None,
    w_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    output_gate: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    activation: str = "swiglu",
    formats: str = "float",
    product: Linear = linear,
) -> Tensor:
    """Computes :func:`moe_ops.gated_mlp_decode`; what enters or leaves a product is in x's
    dtype."""
    kinds = split_formats(formats, 3) or ()
    acc = accumulate_dtype(x.dtype)
    h = rms_norm(x, norm_weight, eps)
    gate = product(h, w_gate, w_gate_scale, None, kinds[0]).to(acc)
    up = product(h, w_up, w_up_scale, None, kinds[1])
    hidden = GATES[activation](gate).mul_(up).to(x.dtype)
    y = product(hidden, w_down, w_down_scale, None, kinds[2]).to(acc) * residual_scale
    if output_gate is not None:
        y *= torch.sigmoid(h.to(acc) @ output_gate.to(acc)).unsqueeze(-1)
    if residual is not None:
        y += residual
    return y.to(x.dtype)

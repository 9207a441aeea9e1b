from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._codes import dequantized, formats_of
from ._common import acc_dtype
from .gated_act import gated_act


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
    formats: str | Sequence[str] = "float",
) -> Tensor:
    """Computes residual + residual_scale * sigmoid(output_gate h) * w_down (act(w_gate h) * w_up
    h), where h is the norm of x."""
    acc = acc_dtype(x.dtype)

    kinds = formats_of(formats, 3)

    def dense(t: Tensor, w: Tensor, scale: Tensor | None, kind: str) -> Tensor:
        if scale is not None:
            w = dequantized(w, scale, format=kind)
        return t @ w.to(acc).T

    h = x.to(acc)
    if norm_weight is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * norm_weight.to(acc)
    gate = dense(h, w_gate, w_gate_scale, kinds[0])
    up = dense(h, w_up, w_up_scale, kinds[1])
    hidden = gated_act(torch.cat((gate, up), -1), activation)
    y = residual_scale * dense(hidden, w_down, w_down_scale, kinds[2])
    if output_gate is not None:
        y = torch.sigmoid(h @ output_gate.to(acc))[:, None] * y
    if residual is not None:
        y = residual.to(acc) + y
    return y.to(x.dtype)

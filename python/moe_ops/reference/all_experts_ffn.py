from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype
from .gated_act import plain_act


def all_experts_ffn(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    input_ids: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Computes y[t, e] = w_down[e] act(w_up[e] x[t, g] + b_up[e]) + b_down[e], g = input_ids[e]."""
    acc = acc_dtype(x.dtype)
    inputs = x.to(acc)[:, input_ids.long()]
    h = torch.einsum("teh,eih->tei", inputs, w_up.to(acc))
    if b_up is not None:
        h = h + b_up.to(acc)
    if activation != "none":
        h = plain_act(h, activation)
    y = torch.einsum("tei,eoi->teo", h, w_down.to(acc))
    if b_down is not None:
        y = y + b_down.to(acc)
    return y.to(x.dtype)

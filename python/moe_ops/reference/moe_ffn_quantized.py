from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._codes import dequantized, formats_of
from ._common import acc_dtype
from .moe_ffn import moe_ffn


def moe_ffn_quantized(
    x: Tensor,
    w_gate_up: Tensor,
    w_gate_up_scale: Tensor,
    w_down: Tensor,
    w_down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    format: str | Sequence[str],
    x_scale: Tensor | None = None,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    w_gate_up_zero: Tensor | None = None,
    w_down_zero: Tensor | None = None,
) -> Tensor:
    """moe_ffn of the weights that the codes and scales stand for; x is not rounded."""
    up, down = formats_of(format, 2)
    acc = acc_dtype(x.dtype)
    tokens = x.to(acc)
    if x_scale is not None:
        tokens = tokens * x_scale.to(acc)
    y = moe_ffn(
        tokens,
        dequantized(w_gate_up, w_gate_up_scale, w_gate_up_zero, format=up, dtype=acc),
        dequantized(w_down, w_down_scale, w_down_zero, format=down, dtype=acc),
        topk_weights,
        topk_ids,
        b_gate_up=None if b_gate_up is None else b_gate_up.to(acc),
        b_down=None if b_down is None else b_down.to(acc),
        activation=activation,
        interleaved=interleaved,
        apply_router_weight_on_input=apply_router_weight_on_input,
        alpha=alpha,
        limit=limit,
    )
    return y.to(x.dtype)

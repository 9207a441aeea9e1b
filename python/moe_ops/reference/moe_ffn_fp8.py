from __future__ import annotations

import torch
from torch import Tensor

from ._common import acc_dtype
from .gated_act import GATED, gated_act, plain_act
from .grouped_gemm_fp8 import grouped_gemm_fp8
from .quantize_fp8 import quantize_fp8
from .sort_by_expert import sort_by_expert
from .unpermute import unpermute


def moe_ffn_fp8(
    x: Tensor,
    w_gate_up: Tensor,
    w_gate_up_scale: Tensor,
    w_down: Tensor,
    w_down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes moe_ffn with dequantized weights, and with x and h rounded to e4m3.

    x is quantized per token, unless it is given quantized with x_scale, and gathered; a routing
    weight on the input multiplies the token's scales. Everything else runs in fp32, or in fp64 for
    fp64 x or x_scale.
    """
    acc = acc_dtype(x.dtype if x_scale is None else x_scale.dtype)
    expert_offsets, row_to_slot, slot_to_row = sort_by_expert(topk_ids, w_gate_up.shape[0])
    weights = topk_weights.to(acc)
    token = row_to_slot.long() // max(topk_ids.shape[1], 1)

    def product(rows: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None):
        scales = (scale.to(acc), w_scale.to(acc))
        return grouped_gemm_fp8(
            rows, scales[0], w, scales[1], expert_offsets, bias=bias, out_dtype=acc
        )

    codes, scale = quantize_fp8(x) if x_scale is None else (x, x_scale)
    rows, scale = codes[token], scale.to(acc)[token]
    if apply_router_weight_on_input:
        scale = scale * weights.reshape(-1)[row_to_slot.long(), None]
    preact = product(rows, scale, w_gate_up, w_gate_up_scale, b_gate_up)
    if activation in GATED:
        h = gated_act(preact, activation, interleaved=interleaved, alpha=alpha, limit=limit)
    else:
        h = plain_act(preact, activation)
    out = product(*quantize_fp8(h), w_down, w_down_scale, b_down)
    y = unpermute(
        out, expert_offsets, slot_to_row, None if apply_router_weight_on_input else weights
    )
    return y.to(out_dtype or x.dtype)

"""Low-rank adapters on quantised experts: W + scaling * B A for the two weights of each expert.

The steps of moe_ffn one by one, with the adapters' products between them; gradients pass through
the quantised weights, which are dequantised in cache. A kernel that has the adapters inside the
grouped products takes the place of `adapted_experts`.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts a token, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moe_ops.ops import (
    gated_act,
    grouped_gemm,
    grouped_gemm_quantized,
    permute,
    sort_slots,
    unpermute,
)
from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.reference.gated_act import plain_act


class ExpertAdapter(NamedTuple):
    """The factors of one adapter: a_gate_up [E, r, H] and b_gate_up [E, 2I, r] of w_gate_up,
    a_down [E, r, I] and b_down [E, H, r] of w_down, all of one type, and their common factor."""

    a_gate_up: Tensor
    b_gate_up: Tensor
    a_down: Tensor
    b_down: Tensor
    scaling: float


def adapted_experts(
    experts: Any,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    adapters: Sequence[ExpertAdapter],
    *,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """`experts(x, topk_weights, topk_ids)` with adapters.

    Args:
        experts: a `QuantizedExperts`, all of whose weights are here.
        x: [T, H], float32, bfloat16 or float16.
        topk_weights, topk_ids: [T, K].
        adapters: are added up. Their products run in their own type.
        apply_router_weight_on_input: as of `QuantizedExperts`.

    Returns:
        [T, H] in the dtype of x.
    """
    on_input = apply_router_weight_on_input
    expert_offsets, row_to_slot, slot_to_row = sort_slots(topk_ids, experts.num_experts)
    rows = permute(x, expert_offsets, row_to_slot)
    if on_input:
        weights = topk_weights.flatten()[row_to_slot.long()]
        rows = (rows * weights[:, None]).to(x.dtype)

    def product(name: str, rows: Tensor, scaled: Tensor) -> Tensor:
        weight, scale, zero = (getattr(experts, name + part) for part in ("", "_scale", "_zero"))
        bias = getattr(experts, name.replace("w_", "b_"))
        bias = None if bias is None else bias.to(rows.dtype)
        y = grouped_gemm_quantized(scaled, weight, scale, expert_offsets, bias=bias, b_zero=zero)
        for adapter in adapters:
            part = name.removeprefix("w_")
            a, b = getattr(adapter, f"a_{part}"), getattr(adapter, f"b_{part}")
            low = grouped_gemm(rows.to(a.dtype), a, expert_offsets)
            y = y + (grouped_gemm(low, b, expert_offsets) * adapter.scaling).to(y.dtype)
        return y

    scaled = rows if experts.x_scale is None else (rows * experts.x_scale).to(rows.dtype)
    preact = product("w_gate_up", rows, scaled)
    if experts.activation in GATED_ACTIVATIONS:
        h = gated_act(
            preact,
            experts.activation,
            interleaved=experts.interleaved,
            alpha=experts.alpha,
            limit=experts.limit,
        )
    else:
        h = plain_act(preact, experts.activation)
    out = product("w_down", h, h)
    return unpermute(out, expert_offsets, slot_to_row, None if on_input else topk_weights)

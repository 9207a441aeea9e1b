"""FLOP counts of the ops' GEMMs, for torch.utils.flop_counter.FlopCounterMode.

A multiply-add counts as two operations, as in torch; arithmetic outside of GEMMs is not counted.
Every slot counts, also empty ones: a count does not read ids. T tokens, N = T * K slots, H hidden
size, I intermediate size, O and D output and input features.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


def count_flops(*ops: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorates a function of an op's arguments, with tensors as their shapes, and of the shapes of
    its results, `out_shape`."""
    packets = [getattr(torch.ops.moe_ops, op) for op in ops]
    return register_flop_formula(packets)  # type: ignore[no-any-return]


@count_flops(
    "grouped_gemm", "grouped_gemm_fp8", "grouped_gemm_quantized", "grouped_gemm_quantized_exact"
)
def _rows_by_experts(a: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * prod(a) * out_shape[-1]


@count_flops("grouped_gemm_wgrad")
def _wgrad(grad: Shape, a: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(grad) * a[1]


@count_flops("grouped_gemm_fp8_wgrad", "grouped_gemm_fp8_wgrad_accumulate")
def _fp8_wgrad(grad: Shape, grad_scale: Shape, a: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(grad) * a[0]  # [O, rows] and [D, rows], padded with zero rows


@count_flops("router_linear")
def _router_linear(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x) * weight[0]


@count_flops("router_linear_bwd")
def _router_linear_bwd(
    grad_logits: Shape,
    x: Shape,
    weight: Shape,
    need_x: bool,
    need_weight: bool,
    *args: Any,
    **_: Any,
) -> int:
    return 2 * prod(x) * weight[0] * (need_x + need_weight)


def _ffn(x: Shape, rows_up: int, width: int, num_slots: int) -> int:
    """Counts both GEMMs of the slots, with `rows_up` output features and intermediate size
    `width`."""
    return 2 * num_slots * x[-1] * (rows_up + width)


_WITHOUT_GATE = {"silu", "gelu", "gelu_tanh", "relu", "relu2"}


def _names(args: tuple[Any, ...]) -> set[str]:
    return {a for a in args if isinstance(a, str)}


@count_flops("moe_ffn", "moe_ffn_fwd")
def _moe_ffn(
    x: Shape, w_gate_up: Shape, w_down: Shape, topk_weights: Shape, *args: Any, **kwargs: Any
) -> int:
    return _ffn(x, w_gate_up[1], w_down[2], prod(topk_weights))


@count_flops("moe_ffn_packed")
def _moe_ffn_packed(
    x: Shape,
    w_gate_up: Shape,
    w_down: Shape,
    packed_gate_up: Shape,
    packed_down: Shape,
    topk_weights: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _ffn(x, w_gate_up[1], w_down[2], prod(topk_weights))


@count_flops("moe_ffn_quantized", "moe_ffn_quantized_fwd", "moe_ffn_fp8")
def _moe_ffn_codes(
    x: Shape,
    w_gate_up: Shape,
    w_gate_up_scale: Shape,
    w_down: Shape,
    w_down_scale: Shape,
    topk_weights: Shape,
    topk_ids: Shape,
    *args: Any,
    activation: str = "swiglu",
    **kwargs: Any,
) -> int:
    # A byte may hold two codes, so that the width between is that of w_gate_up.
    width = w_gate_up[1] // (1 if {activation, *_names(args)} & _WITHOUT_GATE else 2)
    return _ffn(x, w_gate_up[1], width, prod(topk_weights))


@count_flops("moe_ffn_quantized_bwd")
def _moe_ffn_quantized_bwd(
    grad_y: Shape, x: Shape, w_gate_up: Shape, *args: Any, need_x: bool | None = None, **kwargs: Any
) -> int:
    width = w_gate_up[1] // (1 if _names(args) & _WITHOUT_GATE else 2)
    slots = prod(args[3])  # Of topk_weights.
    wanted = args[-2] if need_x is None else need_x
    return 2 * slots * x[-1] * (width + (w_gate_up[1] if wanted else 0))


def _factor_sizes(a: Shape | None, b: Shape | None) -> tuple[int, int]:
    """Returns the elements of each matrix of a pair of low-rank factors."""
    return (0 if a is None else prod(a[1:])), (0 if b is None else prod(b[1:]))


@count_flops("moe_ffn_lora_fwd")
def _moe_ffn_lora_fwd(x: Shape, w_gate_up: Shape, *args: Any, **kwargs: Any) -> int:
    width = w_gate_up[1] // (1 if args[17] in _WITHOUT_GATE else 2)
    slots = prod(args[8])  # Of topk_weights.
    terms = sum(_factor_sizes(*args[10:12])) + sum(_factor_sizes(*args[12:14]))
    return _ffn(x, w_gate_up[1], width, slots) + 2 * slots * terms


@count_flops("moe_ffn_lora_bwd")
def _moe_ffn_lora_bwd(grad_y: Shape, x: Shape, w_gate_up: Shape, *args: Any, **kwargs: Any) -> int:
    width = w_gate_up[1] // (1 if args[22] in _WITHOUT_GATE else 2)
    need_x, _, need_a_up, need_b_up, need_a_down, need_b_down = args[27:33]
    (a_up, b_up), (a_down, b_down) = _factor_sizes(*args[9:11]), _factor_sizes(*args[11:13])
    of_weights = x[-1] * (width + need_x * w_gate_up[1])
    of_up = (need_x or need_a_up) * b_up + need_b_up * b_up + (need_a_up + need_x) * a_up
    of_down = a_down + b_down + need_b_down * b_down + need_a_down * a_down
    return 2 * prod(args[8]) * (of_weights + of_up + of_down)


@count_flops("moe_ffn_bwd", "moe_ffn_bwd_accumulate")
def _moe_ffn_bwd(
    grad_y: Shape,
    x: Shape,
    w_gate_up: Shape,
    w_down: Shape,
    topk_weights: Shape,
    preact: Shape,
    expert_offsets: Shape,
    row_to_slot: Shape,
    slot_to_row: Shape,
    b_down: Shape | None,
    activation: str,
    interleaved: bool,
    apply_router_weight_on_input: bool,
    alpha: float,
    limit: float,
    need_x: bool,
    need_w_gate_up: bool,
    need_w_down: bool,
    need_topk_weights: bool,
    need_b_gate_up: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    up = 2 * prod(topk_weights) * x[-1] * w_gate_up[1]
    down = 2 * prod(topk_weights) * x[-1] * w_down[2]
    past_down = need_x or need_w_gate_up or need_b_gate_up or need_topk_weights
    return up * (need_x + need_w_gate_up) + down * (past_down + need_w_down)


@count_flops("peer_ffn", "peer_ffn_fwd")
def _peer_ffn(
    x: Shape, w_gate_up: Shape, w_down: Shape, topk_weights: Shape, *args: Any, **kwargs: Any
) -> int:
    return _ffn(x, w_gate_up[1], 1, prod(topk_weights))


@count_flops("peer_ffn_bwd")
def _peer_ffn_bwd(
    grad_y: Shape,
    x: Shape,
    w_gate_up: Shape,
    w_down: Shape,
    topk_weights: Shape,
    topk_ids: Shape,
    preact: Shape,
    grad_ids: Shape | None,
    activation: str,
    num_rows: int,
    need_x: bool,
    need_w_gate_up: bool,
    need_w_down: bool,
    need_topk_weights: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    down = 2 * prod(topk_weights) * x[-1]
    up = down * w_gate_up[1]
    past_down = need_x or need_w_gate_up or need_topk_weights
    return up * (need_x + need_w_gate_up) + down * (past_down + need_w_down)


@count_flops("gated_mlp_decode")
def _gated_mlp_decode(x: Shape, w_gate: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * x[0] * w_gate[0] * (2 * x[1] + out_shape[1])


@count_flops("all_experts_ffn")
def _all_experts_ffn(x: Shape, w_up: Shape, w_down: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * (prod(w_up) + prod(w_down))


@count_flops("all_experts_ffn_fwd")
def _all_experts_ffn_fwd(x: Shape, w_up: Shape, w_down: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * (prod(w_up) + prod(w_down))


@count_flops("all_experts_ffn_bwd")
def _all_experts_ffn_bwd(
    grad_y: Shape,
    x: Shape,
    w_up: Shape,
    w_down: Shape,
    input_ids: Shape,
    preact: Shape,
    activation: str,
    need_x: bool,
    need_w_up: bool,
    need_w_down: bool,
    need_b_up: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    past_down = need_x or need_w_up or need_b_up
    up, down = 2 * x[0] * prod(w_up), 2 * x[0] * prod(w_down)
    return up * (need_x + need_w_up) + down * (past_down + need_w_down)


@count_flops("mix_expert_outputs")
def _mix_expert_outputs(outputs: Shape, weights: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(outputs) * weights[1]


@count_flops("mix_expert_outputs_bwd")
def _mix_expert_outputs_bwd(
    grad_y: Shape,
    outputs: Shape,
    weights: Shape,
    factor: Shape | None,
    norm_weight: Shape | None,
    norm_bias: Shape | None,
    mean: Shape | None,
    var: Shape | None,
    activation: str,
    eps: float,
    batch: bool,
    need_weights: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * prod(outputs) * weights[1] * (1 + need_weights)


@count_flops("moe_linear_map")
def _linear_map(x: Shape, w: Shape, topk_ids: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(topk_ids) * prod(w[1:])


@count_flops("moe_linear_map_bwd")
def _linear_map_bwd(
    grad_h: Shape,
    x: Shape,
    w: Shape,
    topk_ids: Shape,
    need_x: bool,
    need_w: bool,
    *args: Any,
    **_: Any,
) -> int:
    return 2 * prod(topk_ids) * prod(w[1:]) * (need_x + need_w)


@count_flops("moe_linear_reduce")
def _linear_reduce(h: Shape, w: Shape, topk_weights: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(topk_weights) * prod(w[1:])


@count_flops("moe_linear_reduce_bwd")
def _linear_reduce_bwd(
    grad_y: Shape,
    h: Shape,
    w: Shape,
    topk_weights: Shape,
    topk_ids: Shape,
    bias: Shape | None,
    need_h: bool,
    need_w: bool,
    need_topk_weights: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * prod(topk_weights) * prod(w[1:]) * ((need_h or need_topk_weights) + need_w)


def _attention(q: Shape, k: Shape) -> int:
    """Counts one GEMM of queries and keys, ignoring causality like torch."""
    batch, queries, slots, heads, size = q
    return 2 * batch * queries * slots * heads * size * k[1]


@count_flops("moa_attention")
def _moa_attention(q: Shape, k: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(q, k)


@count_flops("moa_attention_bwd")
def _moa_attention_bwd(
    grad_out: Shape, grad_state: Shape, q: Shape, k: Shape, *args: Any, **kwargs: Any
) -> int:
    return 5 * _attention(q, k)  # Recomputed scores, and four gradients.


@count_flops("attention_decode")
def _attention_decode(
    x: Shape,
    w_q: Shape,
    w_k: Shape,
    w_v: Shape,
    w_o: Shape,
    cos: Shape,
    sin: Shape,
    keys: Shape,
    values: Shape,
    start: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    batch, length, hidden = x
    tokens = batch * length
    projections = 2 * tokens * hidden * (2 * w_q[0] + w_k[0] + w_v[0])
    return projections + 4 * tokens * w_q[0] * (start + length)


@count_flops("mla_decode")
def _mla_decode(
    x: Shape,
    w_q: Shape,
    w_kv_a: Shape,
    kv_norm: Shape,
    w_kv_b: Shape,
    w_o: Shape,
    cos: Shape,
    sin: Shape,
    latents: Shape,
    rope_keys: Shape,
    start: int,
    num_heads: int,
    scale: float,
    norm_weight: Shape | None = None,
    eps: float = 0.0,
    w_q_a: Shape | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    batch, length, hidden = x
    rank, rope = latents[-1], num_heads * rope_keys[-1]
    queries = w_q[0] * hidden if w_q_a is None else w_q_a[0] * (w_q[0] + hidden)
    values = w_kv_b[0] - (w_q[0] - rope)  # Of all heads, like rope.
    weights = queries + (w_kv_a[0] + values) * hidden + prod(w_kv_b)
    kept = (start + length) * (2 * num_heads * rank + rope)
    return 2 * batch * length * (weights + kept)

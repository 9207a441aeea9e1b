"""The experts function that transformers calls as the forward of an experts module.

T tokens, H hidden size, I intermediate size, E experts, K top-k, N = T*K routed rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _verify as verify
from moe_ops._seam import run_on_cpu
from moe_ops.expert_weights.packing import expert_ffn
from moe_ops.hf.models.gates import fused_activation, fused_gate
from moe_ops.ops import grouped_gemm, permute, sort_by_expert, unpermute


def experts_forward(
    self: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs the experts of a transformers MoE block on moe_ops.

    It calls ``moe_ffn`` once if that op supports the module's activation; otherwise it runs the
    same steps one by one around the module's own activation (and its norm of expert outputs, if
    any).

    Args:
        self: a module decorated with ``use_experts_implementation``; its layout flags, parameters
            and ``_apply_gate`` or ``act_fn`` are read, nothing is written.
        hidden_states: [T, H].
        top_k_index: [T, K], integer. Ids outside [0, E), which occur under expert parallelism, are
            empty slots: they add nothing and get no gradient, whatever their weight.
        top_k_weights: [T, K], any float dtype, used in fp32.
        out_dtype: float32 for unrounded sums, which expert parallelism adds up.

    Returns:
        [T, H] in ``out_dtype``, or for None the dtype of ``hidden_states``. If the parameters have
        another dtype, the GEMMs run in it, as in transformers' ``grouped_mm``.
    """
    has_gate = getattr(self, "has_gate", True)
    w_up, w_down = bank_views(self)
    b_up, b_down = bank_bias(self)
    post_norm = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None

    if verify.takes_own_forward() and out_dtype is None:
        return own_forward(self, hidden_states, top_k_index, top_k_weights)
    act = self._apply_gate if has_gate else self.act_fn
    fused = fused_activation(self) if post_norm is None else None
    y = _run(
        self,
        hidden_states,
        w_up,
        w_down,
        top_k_weights,
        top_k_index,
        act,
        fused,
        b_up=b_up,
        b_down=b_down,
        post_norm=post_norm,
        out_dtype=out_dtype,
    )
    if out_dtype is None and verify.is_due(self):
        verify.compare(
            self,
            "experts",
            y,
            lambda: own_forward(self, hidden_states, top_k_index, top_k_weights),
        )
    return y


def own_forward(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Returns the result of transformers' "eager" loop over experts."""
    ids = torch.where(ids < 0, experts.num_experts, ids.long())  # It requires ids of at least 0.
    y: Tensor = inspect.unwrap(type(experts).forward)(experts, x, ids, weights)
    return y


def bank_views(experts: Any) -> tuple[Tensor, Tensor]:
    """Returns w_gate_up (w_up) and w_down in the layout of moe_ffn, as views."""
    up_name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    w_up, w_down = getattr(experts, up_name), experts.down_proj
    if experts.is_transposed:  # [E, H, 2I] and [E, I, H]: the ops read views with any strides.
        return w_up.transpose(1, 2), w_down.transpose(1, 2)
    return w_up, w_down


def bank_bias(experts: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns b_gate_up (b_up) and b_down."""
    if not experts.has_bias:
        return None, None
    up_name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    return getattr(experts, f"{up_name}_bias"), experts.down_proj_bias


def run_gated(
    bank: nn.Module,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    act_fn: Callable[[Tensor], Tensor],
    *,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """Computes moe_ffn without biases and with the activation ``act_fn(gate) * up``, for any
    `act_fn`.

    `bank` is the module with the weights, which also has their packed copy. Weights on the CPU
    are used there, for tokens of another device.
    """
    if x.device != w_down.device:

        def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
            rest = w_gate_up, w_down, topk_weights, topk_ids, act_fn
            on_input = apply_router_weight_on_input
            return run_gated(bank, x, *rest, apply_router_weight_on_input=on_input)

        return run_on_cpu(run, x, topk_weights, topk_ids)

    def act(preact: Tensor) -> Tensor:
        gate, up = preact.chunk(2, dim=-1)
        return act_fn(gate) * up

    fused = fused_gate(act_fn)
    on_input = apply_router_weight_on_input
    return _run(bank, x, w_gate_up, w_down, topk_weights, topk_ids, act, fused, on_input=on_input)


def _run(
    bank: nn.Module,
    hidden_states: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    act: Callable[[Tensor], Tensor],
    fused: dict[str, Any] | None,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    post_norm: nn.Module | None = None,
    on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    result_dtype = hidden_states.dtype if out_dtype is None else out_dtype
    x = cast_like(hidden_states, w_up)
    b_up = None if b_up is None else cast_like(b_up, w_up)
    b_down = None if b_down is None else cast_like(b_down, w_down)
    if fused is not None and w_up.dtype == w_down.dtype:
        rest: dict[str, Any] = {} if out_dtype is None else {"out_dtype": out_dtype}
        y = expert_ffn(
            bank,
            x,
            w_up,
            w_down,
            topk_weights,
            topk_ids,
            b_gate_up=b_up,
            b_down=b_down,
            apply_router_weight_on_input=on_input,
            **fused,
            **rest,
        )
        return y.to(result_dtype)

    num_tokens, top_k = topk_ids.shape
    if on_input:  # Each slot becomes a token with one expert.
        x = (x[:, None, :] * topk_weights[:, :, None].to(x.dtype)).flatten(0, 1)
        topk_ids = topk_ids.reshape(-1, 1)
    expert_offsets, row_to_slot, slot_to_row = sort_by_expert(topk_ids, w_up.shape[0])
    rows = permute(x, expert_offsets, row_to_slot)
    h = act(grouped_gemm(rows, w_up, expert_offsets, bias=b_up))
    rows = grouped_gemm(cast_like(h, w_down), w_down, expert_offsets, bias=b_down)
    if post_norm is not None:
        rows = post_norm(rows)
    y = unpermute(rows, expert_offsets, slot_to_row, None if on_input else topk_weights)
    if on_input:
        y = y.view(num_tokens, top_k, y.shape[-1]).sum(1)
    return y.to(result_dtype)


def cast_like(t: Tensor, weight: Tensor) -> Tensor:
    """Casts `t` to the dtype of `weight`, except under autocast, where the ops choose the dtype."""
    if t.dtype == weight.dtype or torch.is_autocast_enabled(t.device.type):
        return t
    return t.to(weight.dtype)

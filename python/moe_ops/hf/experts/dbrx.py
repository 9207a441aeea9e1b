"""DBRX's experts on moe_ops.

T tokens, H hidden size, I intermediate size, E experts, K top-k.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.dbrx.modeling_dbrx import DbrxExperts

from moe_ops.hf.experts.forward import cast_like
from moe_ops.ops import grouped_gemm, permute, sort_by_expert, unpermute


class MoeOpsDbrxExperts(DbrxExperts):
    """DbrxExperts with another forward.

    Gate and up are separate parameters, so they stay two GEMMs: one `w_gate_up` would copy both in
    every step.
    """

    replaces = DbrxExperts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
        w_gate, w_up = self.mlp.w1.view(shape), self.mlp.v1.view(shape)
        w_down = self.mlp.w2.view(shape).transpose(1, 2)  # Stored as [E, I, H].
        x = cast_like(hidden_states.reshape(-1, self.hidden_size), w_gate)

        expert_offsets, row_to_slot, slot_to_row = sort_by_expert(top_k_index, self.num_experts)
        rows = permute(x, expert_offsets, row_to_slot)
        gate = grouped_gemm(rows, w_gate, expert_offsets)
        h = self.mlp.activation_fn(gate) * grouped_gemm(rows, w_up, expert_offsets)
        rows = grouped_gemm(h, w_down, expert_offsets)
        y = unpermute(rows, expert_offsets, slot_to_row, top_k_weights)
        return y.to(hidden_states.dtype).view(hidden_states.shape)


Block = MoeOpsDbrxExperts

"""LongCat-Flash's experts, including identity experts, on moe_ops.

T tokens, H hidden size, E experts with weights, Z identity experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from moe_ops.hf.experts.forward import run_gated


class MoeOpsLongcatFlashExperts(LongcatFlashExperts):
    """LongcatFlashExperts until transformers 5.24 with another forward: ids from E on add the token
    times their weight.

    The first parameter has E + Z experts, of which the last Z are never read.
    """

    replaces = LongcatFlashExperts
    num_routed_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        num_experts = self.num_routed_experts
        kept = top_k_weights.masked_fill(top_k_index < num_experts, 0)
        dtype = torch.promote_types(kept.dtype, hidden_states.dtype)
        y = hidden_states * kept.sum(-1, keepdim=True, dtype=dtype)
        if num_experts > 0:
            w_gate_up = self.gate_up_proj[:num_experts]
            # Ids without weights add nothing there.
            y = y + run_gated(
                self,
                hidden_states,
                w_gate_up,
                self.down_proj,
                top_k_weights,
                top_k_index,
                self.act_fn,
            )
        return y.to(hidden_states.dtype)


Block = MoeOpsLongcatFlashExperts

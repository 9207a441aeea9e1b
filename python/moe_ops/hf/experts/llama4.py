"""Llama 4's MoE block on moe_ops.

T tokens, H hidden size, I intermediate size, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from moe_ops.hf.experts.forward import run_gated


class MoeOpsLlama4TextMoe(Llama4TextMoe):
    """Llama4TextMoe with another forward: a token uses its K experts, not all E.

    In the original, unselected experts get zeros and add exact zeros, also to every gradient.
    """

    replaces = Llama4TextMoe

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        router_scores, router_logits = self.router(x)
        topk_ids = torch.topk(router_logits, self.top_k, dim=1).indices
        y = run_gated(
            self,
            x,
            self.experts.gate_up_proj.transpose(1, 2),  # Stored as [E, H, 2I] and [E, I, H].
            self.experts.down_proj.transpose(1, 2),
            router_scores.gather(1, topk_ids),
            topk_ids,
            self.experts.act_fn,
            apply_router_weight_on_input=True,
        )
        out = self.shared_expert(x)
        return out + y.to(out.dtype), router_logits


Block = MoeOpsLlama4TextMoe

"""JetMoE's feed-forward experts on moe_ops.

T tokens, H hidden size, I intermediate size, E experts, K top-k.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE, JetMoeTopKGating

from moe_ops.hf.experts.forward import run_gated


class MoeOpsJetMoeTopKGating(JetMoeTopKGating):
    """Router of one switched block, without host reads; router logits can be recorded."""

    replaces = JetMoeTopKGating

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None, Tensor, None, Tensor]:
        router_logits = self.layer(hidden_states).float()
        # torch.topk, not topk_router: ties, common in bf16, must be broken as in the original.
        topk_logits, topk_ids = router_logits.topk(self.top_k, dim=1)
        topk_weights = topk_logits.softmax(dim=1).type_as(hidden_states)
        return topk_ids, None, topk_weights, None, router_logits


class MoeOpsJetMoeMoE(JetMoeMoE):
    """JetMoeMoE with another forward."""

    replaces = JetMoeMoE

    def forward(self, layer_input: Tensor) -> Tensor:
        x = layer_input.reshape(-1, layer_input.shape[-1])
        topk_ids, _, topk_weights, _, _ = self.router(x)
        w_gate_up, w_down = self.input_linear.weight, self.output_linear.weight
        y = run_gated(self, x, w_gate_up, w_down, topk_weights, topk_ids, self.activation)
        return y.view(layer_input.shape) + self.bias


Block = MoeOpsJetMoeMoE
PARTS = {"router": MoeOpsJetMoeTopKGating}

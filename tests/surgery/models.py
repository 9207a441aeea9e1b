"""Models small enough to be computed by hand, for the tests of `moe_ops.surgery`."""

from __future__ import annotations

import torch
from torch import nn

from moe_ops import zoo
from moe_ops.layers import Experts, MoE, Router


class TwoLayers(nn.Module):
    """Two MoE layers with residuals on x [T, H]."""

    def __init__(self, num_experts: int = 4, top_k: int = 2, *, seed: int = 0, **router) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(
            MoE(Router(6, num_experts, top_k, **router), Experts(num_experts, 6, 5))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def deepseek(seed: int = 0, **overrides) -> nn.Module:
    """A language model of the zoo with groups, a selection bias and a shared expert."""
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_layers": 2, "vocab_size": 32, "intermediate_size": 8}
    model = zoo.create_model("deepseek", dense_intermediate_size=24, **{**small, **overrides})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight.normal_()
                if module.expert_bias is not None:
                    module.expert_bias.normal_(std=0.2)
            elif isinstance(module, Experts):
                module.w_gate_up.normal_(std=0.3)
                module.w_down.normal_(std=0.3)
    return model.eval()


def tokens(batch: int = 2, length: int = 9, vocab: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))

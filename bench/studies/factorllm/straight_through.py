"""A router that the language model loss teaches, to compare with the prior-approximate one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops.layers import MoE, SharedExperts
from moe_ops.layers.routing import valid_ids
from moe_ops.zoo.factorllm import FactorLLM, SliceRouter


class StraightThroughRouter(SliceRouter):
    """`SliceRouter` whose weights are in backward N / K times the slices' probabilities."""

    def weights_of(self, router_logits: Tensor, topk_ids: Tensor) -> Tensor:
        valid, ids = valid_ids(topk_ids, self.num_experts)
        chosen = router_logits.softmax(-1).gather(1, ids)
        weights = torch.ones_like(chosen) + (chosen - chosen.detach())
        return (weights * (self.num_experts / self.top_k)).masked_fill(~valid, 0.0)


class StraightThrough(FactorLLM):
    """FactorLLM with `StraightThroughRouter`s, which start with the values of the others."""

    def make_mlp(self, config: Any) -> MoE | SharedExperts:
        made = super().make_mlp(config)
        assert isinstance(made, MoE)
        drawn = made.router
        with torch.random.fork_rng(devices=[]):
            made.router = StraightThroughRouter(
                config.hidden_size, config.num_slices, config.top_k, bias=True
            )
        made.router.load_state_dict(drawn.state_dict())
        return made

"""The blocks and the model of DeepSeekMoE, of all three generations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_ops.layers import Experts, MoE, SharedExperts, TopKRouter, device_balance_loss
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import Attention, LatentAttention

from ..lm.blocks import Block, attention_entries
from ..lm.checkpoint import Entry, dense_entries, expert_entries
from ..lm.losses import AuxLoss, Routed
from ..lm.model import CausalLM
from .config import DeepSeekConfig


class DeepSeekBlock(Block):
    """Block with experts, or with a dense network."""

    def __init__(self, config: DeepSeekConfig, rope: Rope, *, dense: bool) -> None:
        hidden = config.hidden_size
        attention: Attention | LatentAttention
        if config.latent:
            attention = LatentAttention.of(config, rope)
        else:
            attention = Attention(hidden, config.num_heads, config.head_size, rope)
        mlp: MoE | SharedExperts
        if dense:
            mlp = SharedExperts(hidden, config.dense_intermediate_size)
        else:
            mlp = _experts(config)
        super().__init__(hidden, config.norm_eps, attention, mlp)


def _experts(config: DeepSeekConfig) -> MoE:
    hidden = config.hidden_size
    router = TopKRouter(
        hidden,
        config.num_experts,
        config.top_k,
        score_func=config.score_func,
        renormalize=config.renormalize,
        routed_scaling_factor=config.routed_scaling_factor,
        expert_bias=config.expert_bias,
        num_groups=config.num_groups,
        num_topk_groups=config.num_topk_groups,
        group_score=config.group_score,
        logits_dtype=torch.float32,
    )
    shared = None
    if config.num_shared_experts:
        shared = SharedExperts(hidden, config.num_shared_experts * config.intermediate_size)
    experts = Experts(config.num_experts, hidden, config.intermediate_size)
    return MoE(router, experts, shared)


class DeepSeek(CausalLM):
    """The language model of all three generations; see `CausalLM` for its methods.

    Matches transformers' DeepseekV2ForCausalLM and DeepseekV3ForCausalLM with equal weights.
    """

    config_class = DeepSeekConfig
    config: DeepSeekConfig

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        # Heads that predict later tokens are extra layers in V3's checkpoints.
        first = config.num_layers
        later = "|".join(str(index) for index in range(first, first + 8))
        self.ignored_keys = (*self.ignored_keys, rf"model\.layers\.(?:{later})\..*")
        rope = Rope(
            config.rope_size if config.latent else config.head_size,
            config.rope_theta,
            config.rope_interleaved,
            config.yarn,
        )
        blocks = (
            DeepSeekBlock(config, rope, dense=i < config.num_dense_layers) for i in range(first)
        )
        self.assemble(config, blocks, rope)

    def auxiliary_losses(self) -> Mapping[str, AuxLoss]:
        def device_balance(
            routed: Routed, batch: int, mask: Tensor | None, group: Any = None
        ) -> Tensor:
            return device_balance_loss(
                routed.routing.router_logits,
                routed.routing.topk_ids,
                self.config.num_devices,
                score_func=routed.router.score_func,
                token_mask=mask,
                group=group,
            )

        return {**super().auxiliary_losses(), "device_balance": device_balance}

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        entries = attention_entries(block, ours, theirs)
        if isinstance(block.mlp, SharedExperts):
            return entries + dense_entries(f"{ours}.mlp", f"{theirs}.mlp")
        entries.append(Entry(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.gate.weight",)))
        if self.config.expert_bias:
            key = f"{theirs}.mlp.gate.e_score_correction_bias"
            entries.append(Entry(f"{ours}.mlp.router.expert_bias", (key,)))
        entries += expert_entries(
            f"{ours}.mlp.experts", f"{theirs}.mlp.experts", self.config.num_experts
        )
        if block.mlp.shared_experts is not None:
            entries += dense_entries(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts")
        return entries

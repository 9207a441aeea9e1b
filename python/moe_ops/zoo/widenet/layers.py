"""WideNet's block, used at every depth, and the norms that each depth has.

Letters: B sequences, S places of each, T = B * S, H hidden size, E experts, K experts a token, L
depths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers import Capacity, Experts, MoE, TopKRouter
from moe_ops.layers.self_attention import Attention, MultiHeadAttention

from ..lm.blocks import Step
from ..lm.checkpoint import Entry
from .config import WideNetConfig


class NoisyRouter(Capacity, TopKRouter):
    """Top-K of softmax(x W^T + noise), not renormalised; noise in training, N(0, deviation^2).

    Args:
        noise: the deviation, at least 0.
        hidden_size, num_experts, top_k, options: as of `CapacityRouter`.
    """

    draws_random_numbers = True

    def __init__(self, *sizes: int, noise: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        if noise < 0:
            raise ValueError(f"NoisyRouter: noise must be at least 0, got {noise}.")
        self.noise = noise

    def logits(self, x: Tensor) -> Tensor:
        found = super().logits(x)
        if not self.training or self.noise == 0:
            return found
        return found + self.noise * torch.randn_like(found)


class DenseNetwork(nn.Module):
    """The network of one expert, for every token; x [..., H] to its shape."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ones = torch.ones(len(flat), 1, device=x.device)
        y: Tensor = self.experts(flat, ones, torch.zeros_like(ones, dtype=torch.int64))
        return y.view(x.shape)


def make_ffn(config: WideNetConfig) -> MoE | DenseNetwork:
    """Experts with GELU and biases behind a noisy router; a dense network with one expert."""
    hidden, count = config.hidden_size, config.num_experts
    experts = Experts(count, hidden, config.intermediate_size, activation="gelu_tanh", bias=True)
    if count == 1:
        return DenseNetwork(experts)
    noise = 1 / count if config.noise is None else config.noise
    router = NoisyRouter(
        hidden, count, config.top_k, noise=noise, capacity_factor=config.capacity_factor
    )
    return MoE(router, experts)


class DepthNorms(nn.Module):
    """The two norms that go with a use of the block."""

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class WideBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), with norms that are given."""

    def __init__(self, config: WideNetConfig, attention: Attention | MultiHeadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = make_ffn(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, norms: DepthNorms, step: Step, depth: int, name: str) -> Tensor:
        """x [B, S, H] to its shape.

        Args:
            step: positions and caches of causal attention; notes what the router says under
                `name` with its depth.
        """
        y = norms.attention_norm(x)
        if isinstance(self.attention, Attention):
            assert step.rotation is not None
            y = self.attention(y, step.rotation, step.cache(depth))
        else:
            y = self.attention(y)
        x = x + self.dropout(y)
        y = norms.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            y = step.through(f"{name}.ffn.depth.{depth}", self.ffn, y)
        else:
            y = self.ffn(y)
        out: Tensor = x + self.dropout(y)
        return out


def through_depths(blocks: Any, norms: Any, depth: int, x: Tensor, step: Step) -> Tensor:
    """x through `depth` blocks with their norms, of which there is one for all depths or each."""
    for i in range(depth):
        block, norm = i % len(blocks), i % len(norms)
        x = blocks[block](x, norms[norm], step, i, f"blocks.{block}")
    return x


def counts(config: WideNetConfig) -> tuple[int, int]:
    """How many blocks and how many pairs of norms there are."""
    blocks = config.num_layers if config.sharing == "none" else 1
    return blocks, 1 if config.sharing == "shared_norms" else config.num_layers


def idle_parameters(config: WideNetConfig, blocks: Any) -> int:
    """Of experts that a token does not use if its choices at all depths of a block differ."""
    uses = config.num_layers // len(blocks)
    idle = max(config.num_experts - config.top_k * uses, 0)
    banks = sum(p.numel() for block in blocks for p in block.ffn.experts.parameters())
    return banks * idle // config.num_experts


def same_entries(model: nn.Module) -> list[Entry]:
    """Every tensor under its own name: there is no published checkpoint to agree with. The first
    one is whatever the model made first."""
    return [Entry(name, (name,)) for name in model.state_dict()]

"""Modules that the claims count and measure, built on the meta device at published sizes.

Each module maps one tensor to one tensor. Its attribute `features` is the shape of the input behind
the leading dimensions of a scene, and `rows` multiplies the first of these.

Letters: B sequences, S tokens of each, H hidden size, V vocabulary, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers import Experts, MoE, TopKRouter
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import MultiHeadAttention
from moe_ops.offload import offload_experts
from moe_ops.surgery import override_routing
from moe_ops.surgery.rules import rank, ranking
from moe_ops.zoo.llama import LlamaBlock, LlamaConfig
from moe_ops.zoo.lm.blocks import Step
from moe_ops.zoo.lm.model import CausalLM
from moe_ops.zoo.mofme import feed_forward

LLAMA2_7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    intermediate_size=11_008,
)
MIXTRAL_8X7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    intermediate_size=14_336,
    rope_theta=1e6,
)
MIXTRAL_EXPERTS, MIXTRAL_TOP_K = 8, 2


class Blocks(nn.Module):
    """Blocks of a language model of the zoo without embedding and head; [B, S, H] to [B, S, H]."""

    rows = 1

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        self.features = (model.config.hidden_size,)

    def forward(self, x: Tensor) -> Tensor:
        return self.model.trunk(x, step_of(self.model.rope, x), None)


def step_of(rope: Rope | None, x: Tensor) -> Step:
    """Returns the positions 0 to S - 1 of x [B, S, H], without a cache."""
    positions = torch.arange(x.shape[1], device=x.device)
    return Step(None if rope is None else rope.at(positions), None, False)


def block(model_class: Any, config: Any, **options: Any) -> Blocks:
    """Returns one block of a language model of the zoo."""
    one = dataclasses.replace(config, **{"num_layers": 1, "vocab_size": 1, **options})
    return Blocks(model_class(one))


class Head(nn.Linear):
    """Logits of all positions; [B, S, H] to [B, S, V]."""

    rows = 1

    def __init__(self, config: Any) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.features = (config.hidden_size,)


class Embedding(nn.Embedding):
    """Embedding, which is stored and costs no FLOPs."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.vocab_size, config.hidden_size)


class Images(nn.Module):
    """Network on images [B, channels, size, size], which returns its first output."""

    rows = 1

    def __init__(self, network: nn.Module, channels: int, size: int) -> None:
        super().__init__()
        self.network = network
        self.features = (channels, size, size)

    def forward(self, images: Tensor) -> Tensor:
        out = self.network(images)
        return out if isinstance(out, Tensor) else out[0]


class NeoXBlock(nn.Module):
    """Block of GPT-NeoX, without rotary positions: x + attention(norm(x)) + mlp(norm(x))."""

    rows = 1

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.features = (hidden_size,)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attention = MultiHeadAttention(hidden_size, num_heads)
        self.mlp = feed_forward(hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(self.attention_norm(x), causal=True)
        return x + attended + self.mlp(self.mlp_norm(x))


class MixtralBlock(nn.Module):
    """Block of Mixtral with its own routing; [B, S, H] to [B, S, H]."""

    rows = 1

    def __init__(self, config: LlamaConfig = MIXTRAL_8X7B) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.features = (hidden,)
        self.rope = Rope(config.head_size, config.rope_theta)
        router = TopKRouter(hidden, MIXTRAL_EXPERTS, MIXTRAL_TOP_K, topk_first=True)
        experts = Experts(MIXTRAL_EXPERTS, hidden, config.intermediate_size)
        self.block = LlamaBlock(config, self.rope, MoE(router, experts))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x, step_of(self.rope, x), 0)
        return out


class WeakMixtralBlock(nn.Module):
    """Mixtral block in SCMoE's weak pass, which runs only the expert of rank 2."""

    rows = 1

    def __init__(self, strong: MixtralBlock) -> None:
        super().__init__()
        self.strong, self.features = strong, strong.features

    def forward(self, x: Tensor) -> Tensor:
        with override_routing(self.strong, rank(2)):
            out: Tensor = self.strong(x)
        return out


class BothMixtralBlock(WeakMixtralBlock):
    """Both passes in one call: the first half of the rows is strong, the second half is weak."""

    rows = 2

    def forward(self, x: Tensor) -> Tensor:
        def strong_then_weak(layer: Any, router_logits: Tensor, mask: Tensor | None) -> Tensor:
            ids = ranking(layer.rules(), router_logits, MIXTRAL_TOP_K, mask)
            weak = ids[len(ids) // 2 :]
            weak[:, 0] = -1  # An id outside of the experts contributes nothing.
            return ids

        with override_routing(self.strong, strong_then_weak):
            out: Tensor = self.strong(x)
        return out


class MoELayer(nn.Module):
    """MoE layer without gate projections, as in GPT: [B, S, H] to [B, S, H]."""

    rows = 1

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, activation: str
    ) -> None:
        super().__init__()
        self.features = (hidden_size,)
        experts = Experts(num_experts, hidden_size, intermediate_size, activation=activation)
        self.moe = MoE(TopKRouter(hidden_size, num_experts, 1), experts)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x)
        return out


class TokenByToken(MoELayer):
    """MoE layer that is called once per token, as in decoding of one sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.moe(token) for token in x.split(1, dim=1)], dim=1)


class OffloadedLayer(nn.Module):
    """Offloaded experts, top-1, with one call per token.

    With probability `hit_rate` the next token's expert is one in the cache, and otherwise one that
    is not, drawn uniformly in both cases; the cache is LRU.

    Args:
        layer: the layer in memory, whose weights become the store's.
        num_slots: experts in the cache.
        hit_rate: in [0, 1].
        path: a file for the experts; None: they stay in CPU memory.
    """

    rows = 1

    def __init__(self, layer: MoELayer, num_slots: int, hit_rate: float, path: Path | None) -> None:
        super().__init__()
        self.features = layer.features
        self.hit_rate, self.num_slots = hit_rate, num_slots
        source = layer.moe.experts
        self.num_experts = source.num_experts
        hidden, width = layer.features[0], source.w_down.shape[2]
        with torch.device("meta"):
            shell = MoELayer(self.num_experts, hidden, width, source.activation)
        shell.moe.experts.w_gate_up = source.w_gate_up
        shell.moe.experts.w_down = source.w_down
        self.cache = offload_experts(shell.eval(), num_slots, path=path)
        self.experts = shell.moe.experts  # Those of the cache.
        self.random = random.Random(0)
        self.held: OrderedDict[int, None] = OrderedDict()

    def next_expert(self) -> int:
        if self.held and self.random.random() < self.hit_rate:
            expert = self.random.choice(list(self.held))
        else:
            out = [e for e in range(self.num_experts) if e not in self.held]
            expert = self.random.choice(out)
        self.held[expert] = None
        self.held.move_to_end(expert)
        if len(self.held) > self.num_slots:
            self.held.popitem(last=False)
        return expert

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones(1, 1)
        outputs = [
            self.experts(token, one, torch.tensor([[self.next_expert()]]))
            for token in x.flatten(0, -2).split(1)
        ]
        return torch.cat(outputs).view(x.shape)

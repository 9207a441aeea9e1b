"""Blocks of the zoo's language models, and their inputs besides hidden states.

Letters: B sequences, S tokens of each, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from torch import Tensor, nn

from moe_ops.layers import KVCache, MoE, Router, SharedExperts
from moe_ops.layers.rotary import Rotation
from moe_ops.layers.routing import Routing
from moe_ops.layers.self_attention import Attention, LatentAttention

from .checkpoint import Entry, renamed
from .losses import Routed

# MLA's norm eps, here and in DeepSeek's code.
LATENT_NAMES = (("_a_norm", "_a_layernorm"), ("kv_a_proj", "kv_a_proj_with_mqa"))
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")


class Step:
    """Inputs of blocks besides hidden states: positions, caches, a list that records routing."""

    def __init__(
        self, rotation: Rotation | None, caches: Sequence[KVCache] | None, record: bool
    ) -> None:
        self.rotation = rotation
        self.caches = caches
        self.routing: list[Routed] | None = [] if record else None

    def cache(self, layer: int) -> KVCache | None:
        return None if self.caches is None else self.caches[layer]

    def record(self, layer: str, router: Router, output: Any) -> None:
        """Records a MoEOutput, AttentionExpertsOutput or Routing."""
        if self.routing is not None:
            routing = Routing(output.router_logits, output.topk_weights, output.topk_ids)
            self.routing.append(Routed(layer, router, routing))

    def through(self, layer: str, module: Any, x: Tensor, **options: Any) -> Tensor:
        """Applies a MoE or AttentionExperts to x and records its routing, if enabled."""
        if self.routing is None:
            return module(x, **options)
        output = module(x, return_routing=True, **options)
        self.record(layer, module.router, output)
        return output.y


class Block(nn.Module):
    """Computes x + attention(norm(x)), then x + mlp(norm(x)), with RMS norms; [B, S, H] to [B, S,
    H].

    Args:
        hidden_size, eps: H, and of the norms.
        attention: with positions.
        mlp: experts, or a dense network.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        attention: Attention | LatentAttention,
        mlp: MoE | SharedExperts,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        x = attend(self, x, step, index)
        y = self.mlp_norm(x)
        if isinstance(self.mlp, SharedExperts):
            return x + self.mlp(y)
        return x + step.through(f"layers.{index}.mlp", self.mlp, y)


def attend(block: Any, x: Tensor, step: Step, index: int) -> Tensor:
    """Computes x + attention(norm(x)) of a block."""
    y: Tensor = block.attention(block.attention_norm(x), step.rotation, step.cache(index))
    return x + y


def attention_entries(
    block: Any, ours: str, theirs: str, *, norms: tuple[str, str] = LLAMA_NORMS
) -> list[Entry]:
    """Returns entries of the attention and the two norms of a Llama-like block, given its name in
    the model and in the checkpoint."""
    return [
        Entry(f"{ours}.attention_norm.weight", (f"{theirs}.{norms[0]}.weight",)),
        *projection_entries(block.attention, f"{ours}.attention", f"{theirs}.self_attn"),
        Entry(f"{ours}.mlp_norm.weight", (f"{theirs}.{norms[1]}.weight",)),
    ]


def projection_entries(attention: nn.Module, ours: str, theirs: str) -> list[Entry]:
    """Returns the entries of an attention's own tensors, named as in Llama, DeepSeek and fairseq,
    given both prefixes."""
    there = [name for name, _ in attention.named_parameters()]
    keys = [reduce(lambda key, pair: key.replace(*pair), LATENT_NAMES, name) for name in there]
    return renamed(ours, theirs, dict(zip(there, keys, strict=True)))

"""Kolibri-1: many small experts selected by biased logits, and windowed attention.

Aleph Alpha 2026, Kolibri-1 (huggingface.co/Aleph-Alpha/Kolibri-1).

Letters: H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops._fields import Fields
from moe_ops.layers import Experts, KVCache, MoE, SharedExperts, TopKRouter
from moe_ops.layers.rotary import Rope, Rotation
from moe_ops.layers.self_attention import Attention, causal_attention

from ._presets import preset
from .lm.blocks import Step, projection_entries
from .lm.checkpoint import Entry, dense_entries, expert_entries, renamed
from .lm.config import LLAMA_KEYS, LMConfig, flag, size
from .lm.model import CausalLM

__all__ = ["Kolibri", "KolibriConfig"]


@dataclass(frozen=True)
class KolibriConfig(LMConfig):
    """Sizes of a Kolibri.

    Attributes, beside those of `LMConfig`:
        num_heads, num_kv_heads, head_size: attention heads, key-value heads, features of each.
        window: tokens that windowed attention sees, the current one included.
        full_every: every such block has attention to all tokens and no positions; 0 is none.
        intermediate_size, shared_intermediate_size: I, of one expert and of the shared one.
        num_experts, top_k: E and K.
        renormalize: divides the K weights by their sum.
        rope_theta: base of the rotary embeddings of windowed attention.
        norm_eps: of all norms.
        tie_embeddings: the embedding is also the output's weight.
        bias_update_rate: step of `moe_ops.layers.update_expert_bias` in training.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        **LLAMA_KEYS,
        "num_heads": size("num_attention_heads"),
        "num_kv_heads": size("num_key_value_heads"),
        "head_size": size("head_dim"),
        "window": size("sliding_window"),
        "intermediate_size": size("moe_intermediate_size"),
        "shared_intermediate_size": size("shared_expert_intermediate_size"),
        "num_experts": size("num_local_experts", "num_experts"),
        "top_k": size("num_experts_per_tok"),
        "renormalize": flag("norm_topk_prob", default=False),
        "tie_embeddings": flag("tie_word_embeddings", default=False),
    }
    FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}

    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    window: int = 33
    full_every: int = 2
    intermediate_size: int = 16
    shared_intermediate_size: int = 16
    num_experts: int = 32
    top_k: int = 4
    renormalize: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    bias_update_rate: float = 1e-3

    tiny = preset("Bytes, two blocks, 32 experts: trains on a CPU.")
    kolibri_1 = preset(
        "Kolibri-1: 384 experts in each of 50 blocks.",
        vocab_size=128_000,
        hidden_size=2560,
        num_layers=50,
        num_heads=48,
        num_kv_heads=4,
        head_size=128,
        window=513,
        full_every=5,
        intermediate_size=512,
        shared_intermediate_size=512,
        num_experts=384,
        top_k=6,
        context=262_144,
    )

    def layer_types(self) -> list[str]:
        """Returns what attention each block has, in the words of config.json."""
        full = [self.full_every and (i + 1) % self.full_every == 0 for i in range(self.num_layers)]
        return ["full_attention" if f else "sliding_attention" for f in full]

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        kinds = published.values.get("layer_types") or []
        if not isinstance(kinds, list):
            raise ValueError(f"{cls.__name__}: layer_types must be a list, got {kinds!r}.")
        full = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
        every = (full[0] if full else 0) if kinds else 5
        if kinds and cls(num_layers=len(kinds), full_every=every).layer_types() != list(kinds):
            raise ValueError(
                f"{cls.__name__}: layer_types must have full_attention at regular distances, got "
                f"it in layers {full}."
            )
        return {"full_every": every}

    def write_more(self) -> dict[str, Any]:
        return {
            "architectures": ["Kolibri1ForCausalLM"],
            "model_type": "kolibri1",
            "layer_types": self.layer_types(),
        }


class KolibriAttention(Attention):
    """Attention with RMS norms of queries and keys, in a window with positions or to all without.

    Args:
        config: sizes.
        rope: positions.
        full: attends to all tokens, without positions.
    """

    def __init__(self, config: KolibriConfig, rope: Rope, *, full: bool) -> None:
        super().__init__(
            config.hidden_size,
            config.num_heads,
            config.head_size,
            rope,
            num_kv_heads=config.num_kv_heads,
        )
        self.window = None if full else config.window
        self.q_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, cache: KVCache | None = None) -> Tensor:
        """x [B, S, H] to [B, S, H]; keys and values of x are appended to the cache."""
        heads = (*x.shape[:2], -1, self.head_size)
        q, k = self.q_norm(self.q_proj(x).view(heads)), self.k_norm(self.k_proj(x).view(heads))
        v = self.v_proj(x).view(heads)
        if self.window is not None:
            q, k = self.rope.rotate(q, rotation), self.rope.rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.o_proj(causal_attention(q, k, v, window=self.window).flatten(2))


class KolibriBlock(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: KolibriConfig, rope: Rope, *, full: bool) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm, self.after_attention_norm, self.mlp_norm, self.after_mlp_norm = (
            nn.RMSNorm(hidden, eps=config.norm_eps) for _ in range(4)
        )
        self.attention = KolibriAttention(config, rope, full=full)
        # The bias is added to the logits, of whose experts the weights are the sigmoids.
        router = TopKRouter(
            hidden,
            config.num_experts,
            config.top_k,
            score_func="sigmoid",
            topk_first=True,
            renormalize=config.renormalize,
            expert_bias=True,
            logits_dtype=torch.float32,
        )
        experts = Experts(config.num_experts, hidden, config.intermediate_size)
        self.mlp = MoE(router, experts, SharedExperts(hidden, config.shared_intermediate_size))

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        y = self.attention(self.attention_norm(x), step.rotation, step.cache(index))
        x = x + self.after_attention_norm(y)
        y = step.through(f"layers.{index}.mlp", self.mlp, self.mlp_norm(x))
        return x + self.after_mlp_norm(y)


class Kolibri(CausalLM):
    """The language model; see `CausalLM` for what it can do.

    Equals transformers' Kolibri1ForCausalLM with the same weights.
    """

    config_class = KolibriConfig
    config: KolibriConfig

    def __init__(self, config: KolibriConfig) -> None:
        super().__init__()
        rope = Rope(config.head_size, config.rope_theta)
        kinds = config.layer_types()
        blocks = (KolibriBlock(config, rope, full=kind == "full_attention") for kind in kinds)
        self.assemble(config, blocks, rope)

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        names = {
            "attention_norm.weight": "input_layernorm.weight",
            "after_attention_norm.weight": "post_attn_norm.weight",
            "mlp_norm.weight": "post_attention_layernorm.weight",
            "after_mlp_norm.weight": "post_ffn_norm.weight",
            "mlp.router.weight": "mlp.gate.weight",
            "mlp.router.expert_bias": "moe.router.expert_bias",
        }
        return [
            *renamed(ours, theirs, names),
            *projection_entries(block.attention, f"{ours}.attention", f"{theirs}.self_attn"),
            *expert_entries(
                f"{ours}.mlp.experts", f"{theirs}.mlp.experts", self.config.num_experts
            ),
            *dense_entries(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts"),
        ]

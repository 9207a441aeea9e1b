"""Dense language model in Llama's layout: the starting point and the baseline of upcycling.

Touvron et al. 2023, Llama 2, arXiv 2307.09288; Zhang et al. 2024, TinyLlama, arXiv 2401.02385.

Letters: V vocabulary, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moe_ops._fields import Fields
from moe_ops.layers import MoE, SharedExperts
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import Attention

from ._presets import preset
from .lm.blocks import Block, attention_entries
from .lm.checkpoint import Entry, dense_entries
from .lm.config import LLAMA_KEYS, LMConfig, flag, size
from .lm.model import CausalLM

__all__ = ["Llama", "LlamaConfig"]


@dataclass(frozen=True)
class LlamaConfig(LMConfig):
    """Sizes of a dense model.

    Attributes, beside those of `LMConfig`:
        num_heads, num_kv_heads, head_size: attention heads, those of keys and values, features of
            each.
        intermediate_size: I.
        rope_theta: base of the rotary embeddings.
        norm_eps: of all norms.
        tie_embeddings: the embedding is also the output's weight.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        **LLAMA_KEYS,
        "num_heads": size("num_attention_heads"),
        "intermediate_size": size("intermediate_size"),
        "tie_embeddings": flag("tie_word_embeddings", default=False),
    }
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }

    num_heads: int = 4
    num_kv_heads: int = 4
    head_size: int = 16
    intermediate_size: int = 128
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    tiny = preset("Bytes, two blocks: trains on a CPU.")
    tinyllama_1b = preset(
        "TinyLlama-1.1B.",
        vocab_size=32_000,
        hidden_size=2048,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_size=64,
        intermediate_size=5632,
        norm_eps=1e-5,
        context=2048,
    )

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        heads = published.size("num_attention_heads")
        return {
            "num_kv_heads": published.size("num_key_value_heads", default=heads),
            "head_size": published.size("head_dim", default=published.size("hidden_size") // heads),
        }

    def write_more(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
        }


class LlamaBlock(Block):
    """Attention and a feed-forward network, or its replacement."""

    def __init__(self, config: Any, rope: Rope, mlp: MoE | SharedExperts) -> None:
        hidden, kv_heads = config.hidden_size, config.num_kv_heads
        attention = Attention(
            hidden, config.num_heads, config.head_size, rope, num_kv_heads=kv_heads
        )
        super().__init__(hidden, config.norm_eps, attention, mlp)


class Llama(CausalLM):
    """The language model; see `CausalLM` for its methods.

    Matches transformers' LlamaForCausalLM with equal weights.
    """

    config_class: ClassVar[type[LMConfig]] = LlamaConfig
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        rope = Rope(config.head_size, config.rope_theta)
        layers = range(config.num_layers)
        self.assemble(
            config, (LlamaBlock(config, rope, self.make_mlp(config)) for _ in layers), rope
        )

    def make_mlp(self, config: Any) -> MoE | SharedExperts:
        """Returns the feed-forward part of a block."""
        return SharedExperts(config.hidden_size, config.intermediate_size)

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        entries = attention_entries(block, ours, theirs)
        return entries + dense_entries(f"{ours}.mlp", f"{theirs}.mlp")

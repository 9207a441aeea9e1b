"""Dynamic routing: a token uses as many experts as needed to reach a total routing probability p.

Huang et al. 2024, Harder Tasks Need More Experts: Dynamic Routing in MoE Models, arXiv 2403.07652.

Letters: H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moe_ops._fields import Fields, check_divides
from moe_ops.layers import Experts, MoE, SharedExperts, TopPRouter
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import Attention

from ._presets import preset
from .lm.blocks import Block, attention_entries
from .lm.checkpoint import Entry, dense_entries, expert_entries
from .lm.config import LLAMA_KEYS, OWN, LMConfig, number, size
from .lm.model import CausalLM

__all__ = ["TopP", "TopPConfig"]


@dataclass(frozen=True)
class TopPConfig(LMConfig):
    """Sizes and options of a model with dynamic routing.

    Attributes, beside those of `LMConfig`:
        num_layers: blocks; blocks with an index divisible by `expert_frequency` have experts
            (always the first, index 0), the others a dense network of the same width I.
        expert_frequency: see num_layers.
        num_heads: attention heads, each of H / num_heads features.
        intermediate_size: I.
        num_experts: E.
        top_p: p, the total probability that a token's experts must reach.
        max_experts: maximum experts per token; None is E.
        expected_experts: experts per token assumed when counting active parameters.
        rope_theta: base of the rotary embeddings.
        norm_eps: of all norms.
        load_balancing_coefficient, entropy_coefficient: of the losses, summed over layers. Without
            the second, training spreads the routing of every token over many experts.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        **LLAMA_KEYS,
        "expert_frequency": size("expert_frequency", default=2),
        "num_heads": size("num_attention_heads"),
        "intermediate_size": size("intermediate_size"),
        "num_experts": size("num_experts"),
        "top_p": number("top_p_threshold", default=OWN),
        "expected_experts": size("experts_topk", default=OWN),
    }
    FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "tie_word_embeddings": False}
    LOSSES = ("load_balancing", "entropy")

    expert_frequency: int = 1
    num_heads: int = 4
    intermediate_size: int = 64
    num_experts: int = 8
    top_p: float = 0.4
    max_experts: int | None = None
    expected_experts: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    load_balancing_coefficient: float = 1e-2
    entropy_coefficient: float = 1e-4

    tiny = preset("Bytes, two blocks with eight experts each: trains on a CPU.")

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        published.must_be("num_key_value_heads", published.size("num_attention_heads"))
        return {}

    def write_more(self) -> dict[str, Any]:
        return {
            "architectures": ["MoEForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": self.num_heads,
        }


class TopPBlock(Block):
    """Block with experts, or with a dense network."""

    def __init__(self, config: TopPConfig, rope: Rope, *, dense: bool) -> None:
        hidden = config.hidden_size
        attention = Attention(hidden, config.num_heads, rope.size, rope)
        mlp: MoE | SharedExperts
        if dense:
            mlp = SharedExperts(hidden, config.intermediate_size)
        else:
            router = TopPRouter(
                hidden,
                config.num_experts,
                config.expected_experts,
                top_p=config.top_p,
                max_k=config.max_experts,
            )
            mlp = MoE(router, Experts(config.num_experts, hidden, config.intermediate_size))
        super().__init__(hidden, config.norm_eps, attention, mlp)


class TopP(CausalLM):
    """The language model; see `CausalLM` for its methods."""

    config_class = TopPConfig
    config: TopPConfig

    def __init__(self, config: TopPConfig) -> None:
        super().__init__()
        check_divides("TopP", "num_heads", config.num_heads, "hidden_size", config.hidden_size)
        rope = Rope(config.hidden_size // config.num_heads, config.rope_theta)
        layers, every = range(config.num_layers), config.expert_frequency
        blocks = (TopPBlock(config, rope, dense=bool(i % every)) for i in layers)
        self.assemble(config, blocks, rope)

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        norms = ("input_norm", "post_attention_norm")
        entries = attention_entries(block, ours, theirs, norms=norms)
        if isinstance(block.mlp, SharedExperts):
            return entries + dense_entries(f"{ours}.mlp", f"{theirs}.mlp.mlp")
        return [
            *entries,
            Entry(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.router.weight",)),
            *expert_entries(
                f"{ours}.mlp.experts", f"{theirs}.mlp.experts", self.config.num_experts
            ),
        ]

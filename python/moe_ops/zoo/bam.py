"""BAM: attention and feed-forward experts from dense models that were trained separately.

Zhang et al. 2024, BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of
Experts, arXiv 2408.08274. With dense attention it is Branch-Train-MiX (BTX; Sukhbaatar et al. 2024,
arXiv 2403.07816), the paper's baseline.

Letters: H hidden size, I intermediate size, E experts, n heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops import upcycle
from moe_ops._fields import Fields, check_choice
from moe_ops.layers import AttentionExperts, Experts, MoE, SharedExperts, TopKRouter
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import Attention

from ._presets import preset
from .lm.blocks import Step, projection_entries
from .lm.checkpoint import Entry, dense_entries, expert_entries
from .lm.config import LLAMA_KEYS, OWN, Key, LMConfig, flag, size
from .lm.model import CausalLM

__all__ = ["BAM", "BAMConfig"]

ATTENTION = ("expert_kv", "shared_kv", "dense")


@dataclass(frozen=True)
class BAMConfig(LMConfig):
    """Sizes and options of a BAM and of the dense models it is built from.

    Attributes, beside those of `LMConfig`:
        num_experts: E; 1 is a dense model.
        top_k: feed-forward experts per token.
        attention: "expert_kv": attention experts with keys and values of their own; "shared_kv":
            with common ones; "dense": no attention experts (BTX).
        attention_top_k: attention experts per token, None: all of them, weighted by a softmax.
        num_heads, num_kv_heads, head_size: of dense attention. Attention experts have as many heads
            of keys and values as of queries.
        intermediate_size: I.
        rope_theta: base of the rotary embeddings.
        norm_eps: of all norms.
        tie_embeddings: the embedding is also the output's weight.
        load_balancing_coefficient, router_z_coefficient: of the losses, summed over the layers that
            route tokens. The paper does not give them.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        **LLAMA_KEYS,
        "num_heads": size("num_attention_heads"),
        "num_kv_heads": size("num_key_value_heads"),
        "head_size": size("head_dim"),
        "intermediate_size": size("intermediate_size"),
        "num_experts": size("num_experts", default=OWN),
        "top_k": size("num_experts_per_tok", default=OWN),
        "attention": Key("choice", ("attention_experts",), {"of": ATTENTION, "default": OWN}),
        "attention_top_k": size("num_attention_experts_per_tok", default=None),
        "tie_embeddings": flag("tie_word_embeddings", default=False),
    }
    FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}
    LOSSES = ("load_balancing", "router_z")

    num_experts: int = 4
    top_k: int = 1
    attention: str = "expert_kv"
    attention_top_k: int | None = None
    num_heads: int = 4
    num_kv_heads: int = 4
    head_size: int = 16
    intermediate_size: int = 128
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    load_balancing_coefficient: float = 1e-2
    router_z_coefficient: float = 1e-3

    tiny = preset("Bytes, two blocks, four experts: trains on a CPU.")
    bam_590m = preset(
        "Four experts from dense models of 590 million parameters: the published width of 4096 "
        "counts gate and up projections together.",
        vocab_size=256_000,
        hidden_size=1024,
        num_layers=6,
        num_heads=8,
        num_kv_heads=8,
        head_size=128,
        intermediate_size=2048,
    )
    bam_2b = preset(
        "Four experts from dense models of 2 billion parameters; the published width is 18,432.",
        vocab_size=256_000,
        hidden_size=2304,
        num_layers=18,
        num_heads=18,
        num_kv_heads=6,
        head_size=128,
        intermediate_size=9216,
        tie_embeddings=True,
    )

    def aux_coefficients(self) -> dict[str, float]:
        return {} if self.num_experts == 1 else super().aux_coefficients()

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        published.choice("model_type", of=("bam",))
        return {}

    def write_more(self) -> dict[str, Any]:
        return {"architectures": ["BAM"], "model_type": "bam"}


class BAMBlock(nn.Module):
    """Computes x + attention(norm(x)) + mlp(norm(x)), with one norm; [B, S, H] to [B, S, H]."""

    attention: Attention | AttentionExperts
    mlp: SharedExperts | MoE

    def __init__(self, config: BAMConfig, rope: Rope) -> None:
        super().__init__()
        hidden, experts = config.hidden_size, config.num_experts
        self.norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        if experts == 1 or config.attention == "dense":
            self.attention = Attention(
                hidden, config.num_heads, config.head_size, rope, num_kv_heads=config.num_kv_heads
            )
        else:
            self.attention = AttentionExperts(
                TopKRouter(hidden, experts, config.attention_top_k or experts),
                config.num_heads,
                config.head_size,
                rope_theta=rope.theta,
                soft_routing=config.attention_top_k is None,
                expert_kv=config.attention == "expert_kv",
            )
        if experts == 1:
            self.mlp = SharedExperts(hidden, config.intermediate_size)
        else:
            router = TopKRouter(hidden, experts, config.top_k)
            self.mlp = MoE(router, Experts(experts, hidden, config.intermediate_size))

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        assert step.rotation is not None
        y, cache = self.norm(x), step.cache(index)
        if isinstance(self.attention, Attention):
            attended = self.attention(y, step.rotation, cache)
        elif self.attention.soft_routing:  # It has no router, so there is no load to balance.
            attended = self.attention(y, cache=cache, angles=step.rotation)
        else:
            name = f"layers.{index}.attention"
            attended = step.through(name, self.attention, y, cache=cache, angles=step.rotation)
        if isinstance(self.mlp, SharedExperts):
            return x + attended + self.mlp(y)
        return x + attended + step.through(f"layers.{index}.mlp", self.mlp, y)


class BAM(CausalLM):
    """The language model; see `CausalLM` for its methods. With one expert it is dense."""

    config_class = BAMConfig
    config: BAMConfig

    def __init__(self, config: BAMConfig) -> None:
        super().__init__()
        check_choice("BAM", "attention", config.attention, ATTENTION)
        rope = Rope(config.head_size, config.rope_theta)
        blocks = (BAMBlock(config, rope) for _ in range(config.num_layers))
        self.assemble(config, blocks, rope)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, models: Sequence[BAM], **options: Any) -> BAM:
        """Creates one expert from each dense model: a seed, and continuations of it on several
        domains.

        Their feed-forward networks become experts. Their attention also becomes experts unless it
        is dense: dense attention is averaged, like all other parameters. Routers are initialized
        randomly.

        Args:
            models: dense models (num_experts = 1) of one config, at least two.
            options: fields of the config: attention, attention_top_k, top_k, coefficients.

        Raises:
            ValueError: fewer than two models, models with experts, or of several configs.
        """
        dense = list(models)
        if len(dense) < 2 or any(m.config != dense[0].config for m in dense):
            raise ValueError(
                f"BAM.from_dense: models must be two or more of one config, got {len(dense)}."
            )
        if dense[0].config.num_experts != 1:
            raise ValueError(
                "BAM.from_dense: models must be dense, with num_experts = 1, got "
                f"{dense[0].config.num_experts}."
            )
        config = dataclasses.replace(dense[0].config, **options, num_experts=len(dense))
        model = cls(config).to(dense[0].embed_tokens.weight)
        states = [m.state_dict() for m in dense]
        mixed = {name: upcycle.attention.mean_of([s[name] for s in states]) for name in states[0]}
        # Expert and router keys do not exist in the dense models.
        own = model.state_dict()
        fitting = {name: t for name, t in mixed.items() if name in own and ".mlp." not in name}
        if config.attention != "dense":
            fitting = {name: t for name, t in fitting.items() if ".attention." not in name}
        model.load_state_dict(fitting, strict=False)
        for index, block in enumerate(model.layers):
            sources = [m.layers[index] for m in dense]
            block.mlp.experts = upcycle.experts_from_dense([s.mlp for s in sources])
            if config.attention != "dense":
                block.attention = upcycle.upcycle_attention(
                    [s.attention for s in sources],
                    block.attention.router,
                    rope_theta=config.rope_theta,
                    expert_kv=config.attention == "expert_kv",
                    soft_routing=config.attention_top_k is None,
                )
        return model.train(dense[0].training)

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        experts = self.config.num_experts
        entries = [Entry(f"{ours}.norm.weight", (f"{theirs}.input_layernorm.weight",))]
        if isinstance(block.attention, Attention):
            entries += projection_entries(
                block.attention, f"{ours}.attention", f"{theirs}.self_attn"
            )
        else:
            entries += self._attention_entries(f"{ours}.attention", f"{theirs}.self_attn")
        if experts == 1:
            return entries + dense_entries(f"{ours}.mlp", f"{theirs}.mlp")
        return [
            *entries,
            Entry(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.router.weight",)),
            *expert_entries(f"{ours}.mlp.experts", f"{theirs}.mlp.experts", experts),
        ]

    def _attention_entries(self, ours: str, theirs: str) -> list[Entry]:
        def of_experts(name: str) -> tuple[str, ...]:
            numbers = range(self.config.num_experts)
            return tuple(f"{theirs}.experts.{e}.{name}_proj.weight" for e in numbers)

        kv: tuple[str, ...] = (f"{theirs}.k_proj.weight", f"{theirs}.v_proj.weight")
        if self.config.attention == "expert_kv":
            kv = (*of_experts("k"), *of_experts("v"))
        return [
            Entry(f"{ours}.router.weight", (f"{theirs}.router.weight",)),
            Entry(f"{ours}.w_query", of_experts("q"), "experts"),
            Entry(f"{ours}.w_output", of_experts("o"), "experts"),
            Entry(f"{ours}.kv_proj.weight", kv, "rows"),
        ]

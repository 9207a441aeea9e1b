"""JetMoE: attention experts and feed-forward experts in every block.

Shen et al. 2024, JetMoE: Reaching Llama2 Performance with 0.1M Dollars, arXiv 2404.07413.

Letters: B sequences, S tokens, H hidden size, I intermediate size, E experts, K experts a token,
n key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops._fields import Fields, overridden
from moe_ops.layers import AttentionExperts, Experts, MoE, ResidualNorm, Router

from .lm.attention import Rope, published_rope
from .lm.checkpoint import Entry
from .lm.embedding import TokenEmbedding
from .lm.model import CausalLM, Step

# The published code gives its block norms no eps from the config; the last norm has it.
BLOCK_NORM_EPS = 1e-6


@dataclass(frozen=True)
class JetMoEConfig:
    """Sizes of a JetMoE.

    Attributes:
        vocab_size: V.
        hidden_size: H.
        num_layers: blocks.
        num_kv_heads, head_size: n and d; a token has K * n query heads.
        intermediate_size: I.
        num_experts, top_k: E and K, of the attention and of the feed-forward experts.
        rope_theta: base of the rotary embeddings.
        context: tokens it was trained on; nothing is limited by it.
        norm_eps: of the last norm; those of the blocks have 1e-6.
        tie_embeddings: the embedding is also the output's weight.
        init_std: of all weights; biases start at 0.
        load_balancing_coefficient, router_z_coefficient: of the losses, which are summed over both
            kinds of experts of all blocks.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("tiny", "jetmoe_8b")

    vocab_size: int = 32_000
    hidden_size: int = 2048
    num_layers: int = 24
    num_kv_heads: int = 16
    head_size: int = 128
    intermediate_size: int = 5632
    num_experts: int = 8
    top_k: int = 2
    rope_theta: float = 10_000.0
    context: int = 4096
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.01
    load_balancing_coefficient: float = 0.01
    router_z_coefficient: float = 0.001

    @classmethod
    def jetmoe_8b(cls) -> JetMoEConfig:
        """JetMoE-8B: 8.5 billion parameters, 2.2 billion a token."""
        return cls()

    @classmethod
    def tiny(cls) -> JetMoEConfig:
        """Bytes, two blocks, four experts: trains on a CPU."""
        return cls(
            vocab_size=256,
            hidden_size=64,
            num_layers=2,
            num_kv_heads=2,
            head_size=16,
            intermediate_size=64,
            num_experts=4,
            context=128,
            init_std=0.02,
        )

    def aux_coefficients(self) -> dict[str, float]:
        return {
            "load_balancing": self.load_balancing_coefficient,
            "router_z": self.router_z_coefficient,
        }

    @classmethod
    def from_published(cls, published: Mapping[str, Any], **overrides: Any) -> JetMoEConfig:
        """From config.json: of transformers, or of the code released with the checkpoint, which has
        other names for I, E and K."""

        read = Fields(published, cls.__name__)
        read.must_be("activation_function", "silu")
        theta, yarn = published_rope(read)
        if yarn is not None:
            raise ValueError("JetMoEConfig: rope_scaling must be none, got yarn.")
        config = cls(
            vocab_size=read.size("vocab_size"),
            hidden_size=read.size("hidden_size"),
            num_layers=read.size("num_hidden_layers"),
            num_kv_heads=read.size("num_key_value_heads"),
            head_size=read.size("kv_channels"),
            intermediate_size=read.size("intermediate_size", "ffn_hidden_size"),
            num_experts=read.size("num_local_experts", "moe_num_experts"),
            top_k=read.size("num_experts_per_tok", "moe_top_k"),
            rope_theta=theta,
            context=read.size("max_position_embeddings", default=cls.context),
            norm_eps=read.number("rms_norm_eps", default=cls.norm_eps, least=0),
            tie_embeddings=read.flag("tie_word_embeddings", default=True),
            init_std=read.number("initializer_range", default=cls.init_std, least=0),
            load_balancing_coefficient=read.number(
                "aux_loss_coef", default=cls.load_balancing_coefficient
            ),
        )
        return overridden(config, overrides)

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {
            "architectures": ["JetMoeForCausalLM"],
            "model_type": "jetmoe",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "num_attention_heads": self.num_kv_heads * self.top_k,
            "kv_channels": self.head_size,
            "intermediate_size": self.intermediate_size,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            "aux_loss_coef": self.load_balancing_coefficient,
            "activation_function": "silu",
        }


class JetMoEBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) + bias.

    What a half of a block adds to x is added by the norm after it, in one pass.
    """

    def __init__(self, config: JetMoEConfig) -> None:
        super().__init__()
        hidden, experts = config.hidden_size, config.num_experts
        self.attention_norm = ResidualNorm(hidden, eps=BLOCK_NORM_EPS)
        self.attention = AttentionExperts(
            Router.like("jetmoe", hidden, experts, config.top_k),
            config.num_kv_heads,
            config.head_size,
            rope_theta=config.rope_theta,
            bias=True,
        )
        self.mlp_norm = ResidualNorm(hidden, eps=BLOCK_NORM_EPS)
        self.mlp = MoE(
            Router.like("jetmoe", hidden, experts, config.top_k),
            Experts(experts, hidden, config.intermediate_size),
        )
        self.mlp_bias = nn.Parameter(torch.zeros(hidden))

    def forward(
        self, x: Tensor, delta: Tensor | None, bias: Tensor | None, step: Step, index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From x + delta + bias, what came in, to the same three of what goes out."""
        record = step.routing is not None
        y, x = self.attention_norm(x, delta, bias)
        attended = self.attention(
            y,
            cache=step.cache(index),
            angles=step.rotation,
            add_bias=False,
            return_routing=record,
        )
        if record:
            step.record(f"layers.{index}.attention", self.attention.router, attended)
            attended = attended.y
        y, x = self.mlp_norm(x, attended, self.attention.bias)
        mixed = self.mlp(y, return_routing=record)
        if record:
            step.record(f"layers.{index}.mlp", self.mlp.router, mixed)
            mixed = mixed.y
        return x, mixed, self.mlp_bias


class JetMoE(CausalLM):
    """The language model; see `CausalLM` for what it can do.

    Equals transformers' JetMoeForCausalLM with the same weights.
    """

    config_class = JetMoEConfig
    config: JetMoEConfig

    def __init__(self, config: JetMoEConfig) -> None:
        super().__init__()
        self.config = config
        # The attention experts rotate by themselves; angles are the same in all blocks.
        self.rope = Rope(config.head_size, config.rope_theta)
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(JetMoEBlock(config) for _ in range(config.num_layers))
        self.norm = ResidualNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = None
        if config.tie_embeddings:
            # Also stored by some writers; the embedding is what counts.
            self.ignored_keys = (*self.ignored_keys, r"lm_head\.weight")
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def trunk(self, x: Tensor, step: Step, last: int | None) -> Tensor:
        delta = bias = None
        for index, layer in enumerate(self.layers):
            x, delta, bias = layer(x, delta, bias, step, index)
        if last is not None:
            x, delta = x[:, -last:], None if delta is None else delta[:, -last:]
        return self.norm(x, delta, bias)[0]

    def reset_parameters(self) -> None:
        """Weights N(0, init_std), norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def entries(self) -> list[Entry]:
        entries = [Entry("embed_tokens.weight", ("model.embed_tokens.weight",))]
        names = {
            "attention_norm.weight": "input_layernorm.weight",
            "attention.router.weight": "self_attention.experts.router.layer.weight",
            "attention.w_query": "self_attention.experts.input_linear.weight",
            "attention.w_output": "self_attention.experts.output_linear.weight",
            "attention.bias": "self_attention.experts.bias",
            "attention.kv_proj.weight": "self_attention.kv_proj.weight",
            "mlp_norm.weight": "post_attention_layernorm.weight",
            "mlp.router.weight": "mlp.router.layer.weight",
            "mlp.experts.w_gate_up": "mlp.input_linear.weight",
            "mlp.experts.w_down": "mlp.output_linear.weight",
            "mlp_bias": "mlp.bias",
        }
        for i in range(self.config.num_layers):
            entries += [
                Entry(f"layers.{i}.{ours}", (f"model.layers.{i}.{theirs}",))
                for ours, theirs in names.items()
            ]
        entries.append(Entry("norm.weight", ("model.norm.weight",)))
        if self.lm_head is not None:
            entries.append(Entry("lm_head.weight", ("lm_head.weight",)))
        return entries

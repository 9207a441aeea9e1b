"""JetMoE: attention experts and feed-forward experts in every block.

Shen et al. 2024, JetMoE: Reaching Llama2 Performance with 0.1M Dollars, arXiv 2404.07413.

Letters: B sequences, S tokens, H hidden size, I intermediate size, E experts, K experts per token,
n key-value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops.layers import AddRMSNorm, AttentionExperts, Experts, MoE, TopKRouter
from moe_ops.layers.rotary import Rope

from ._presets import preset
from .lm.blocks import Step
from .lm.checkpoint import Entry, renamed
from .lm.config import LLAMA_KEYS, OWN, LMConfig, flag, number, size
from .lm.model import CausalLM

__all__ = ["JetMoE", "JetMoEConfig"]

# The published block norms do not use the config's eps; only the last norm does.
BLOCK_NORM_EPS = 1e-6


@dataclass(frozen=True)
class JetMoEConfig(LMConfig):
    """Sizes of a JetMoE.

    Attributes, beside those of `LMConfig`:
        num_kv_heads, head_size: n and d; a token has K * n query heads.
        intermediate_size: I.
        num_experts, top_k: E and K, of the attention and of the feed-forward experts.
        rope_theta: base of the rotary embeddings.
        norm_eps: eps of the last norm; block norms have 1e-6.
        tie_embeddings: the embedding is also the output's weight.
        init_std: of all weights; biases start at 0.
        load_balancing_coefficient, router_z_coefficient: of the losses, which are summed over both
            kinds of experts of all blocks.
    """

    # Names in transformers, then in the code released with the checkpoint, which has other names
    # for I, E and K.
    KEYS: ClassVar[dict[str, Any]] = {
        **LLAMA_KEYS,
        "num_kv_heads": size("num_key_value_heads"),
        "head_size": size("kv_channels"),
        "intermediate_size": size("intermediate_size", "ffn_hidden_size"),
        "num_experts": size("num_local_experts", "moe_num_experts"),
        "top_k": size("num_experts_per_tok", "moe_top_k"),
        "tie_embeddings": flag("tie_word_embeddings", default=True),
        "load_balancing_coefficient": number("aux_loss_coef", default=OWN),
    }
    FIXED: ClassVar[dict[str, Any]] = {"activation_function": "silu"}
    LOSSES = ("load_balancing", "router_z")

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

    tiny = preset(
        "Bytes, two blocks, four experts: trains on a CPU.",
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
    jetmoe_8b = preset("JetMoE-8B: 8.5 billion parameters, 2.2 billion a token.")

    def write_more(self) -> dict[str, Any]:
        return {
            "architectures": ["JetMoeForCausalLM"],
            "model_type": "jetmoe",
            "num_attention_heads": self.num_kv_heads * self.top_k,
        }


class JetMoEBlock(nn.Module):
    """Computes x + attention(norm(x)), then x + mlp(norm(x)) + bias.

    The following norm adds the output of each half of a block to x, in one pass.
    """

    def __init__(self, config: JetMoEConfig) -> None:
        super().__init__()
        hidden, experts = config.hidden_size, config.num_experts
        self.attention_norm = AddRMSNorm(hidden, eps=BLOCK_NORM_EPS)
        self.attention = AttentionExperts(
            TopKRouter(hidden, experts, config.top_k, topk_first=True),
            config.num_kv_heads,
            config.head_size,
            rope_theta=config.rope_theta,
            bias=True,
        )
        self.mlp_norm = AddRMSNorm(hidden, eps=BLOCK_NORM_EPS)
        self.mlp = MoE(
            TopKRouter(hidden, experts, config.top_k, topk_first=True),
            Experts(experts, hidden, config.intermediate_size),
        )
        self.mlp_bias = nn.Parameter(torch.zeros(hidden))

    def forward(
        self, x: Tensor, delta: Tensor | None, bias: Tensor | None, step: Step, index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (x, delta, bias) of the previous block to those of this block."""
        y, x = self.attention_norm(x, delta, bias)
        attended = step.through(
            f"layers.{index}.attention",
            self.attention,
            y,
            cache=step.cache(index),
            angles=step.rotation,
            add_bias=False,
        )
        y, x = self.mlp_norm(x, attended, self.attention.bias)
        return x, step.through(f"layers.{index}.mlp", self.mlp, y), self.mlp_bias


class JetMoE(CausalLM):
    """The language model; see `CausalLM` for its methods.

    Matches transformers' JetMoeForCausalLM with equal weights.
    """

    config_class = JetMoEConfig
    config: JetMoEConfig

    def __init__(self, config: JetMoEConfig) -> None:
        super().__init__()
        blocks = (JetMoEBlock(config) for _ in range(config.num_layers))
        # The attention experts apply rotary embeddings themselves; all blocks have equal angles.
        rope = Rope(config.head_size, config.rope_theta)
        norm = AddRMSNorm(config.hidden_size, eps=config.norm_eps)
        self.assemble(config, blocks, rope, norm)

    def trunk(self, x: Tensor, step: Step, last: int | None) -> Tensor:
        delta = bias = None
        for index, layer in enumerate(self.layers):
            x, delta, bias = layer(x, delta, bias, step, index)
        if last is not None:
            x, delta = x[:, -last:], None if delta is None else delta[:, -last:]
        return self.norm(x, delta, bias)[0]

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
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
        return renamed(ours, theirs, names)

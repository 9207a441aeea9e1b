"""The blocks and the model of ModuleFormer, whose experts can be added and taken away.

Letters: B sequences, S tokens, H hidden size, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from moe_ops.layers import AttentionExperts, Experts, GateRouter, MoE

from ..lm.blocks import Step
from ..lm.checkpoint import Entry, renamed
from ..lm.model import CausalLM
from .config import ModuleFormerConfig

# Keys of a router's tensors, by the kind of its gate.
_GATES = {
    "linear": {"weight": "w_gate.0.weight"},
    "mlp": {
        "stem.weight": "w_gate.0.weight",
        "stem.bias": "w_gate.0.bias",
        "weight": "w_gate.3.weight",
    },
    "cosine": {
        "stem.weight": "w_gate.weight",
        "weight": "expert_centroids",
        "temperature": "temperature",
    },
}
_NORM = {"weight": "weight", "bias": "bias"}


class ModuleFormerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Attention breaks sticks and knows no
    positions; the weights of experts are not renormalised."""

    def __init__(self, config: ModuleFormerConfig, experts: tuple[int, int]) -> None:
        super().__init__()
        hidden = config.hidden_size

        def router(num_experts: int, top_k: int) -> GateRouter:
            return GateRouter(
                hidden,
                num_experts,
                top_k,
                gate=config.gate,
                gate_size=None if config.gate == "linear" else config.gate_size,
                gate_dropout=config.gate_dropout,
                sample_top_k=config.sample_top_k,
            )

        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = AttentionExperts(
            router(experts[0], config.top_k_attention),
            config.num_heads,
            config.attention_size // config.num_heads,
            kind="stick_breaking",
            kv_bias=True,
        )
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = MoE(
            router(experts[1], config.top_k_mlp),
            Experts(experts[1], hidden, config.intermediate_size, activation="gelu_tanh"),
        )

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        attended = step.through(
            f"layers.{index}.attention",
            self.attention,
            self.attention_norm(x),
            cache=step.cache(index),
        )
        x = x + attended
        return x + step.through(f"layers.{index}.mlp", self.mlp, self.mlp_norm(x))


class ModuleFormer(CausalLM):
    """The language model; see `CausalLM` for what it can do.

    Layers of its blocks may be replaced by what `append` and `select` of `MoE` and
    `AttentionExperts` make of them; `note_experts` comes afterwards.
    """

    config_class = ModuleFormerConfig
    ignored_keys = (r"attn\.mask", r"attn\.cum_weight")
    config: ModuleFormerConfig

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__()
        if config.attention_size % config.num_heads:
            raise ValueError(
                f"ModuleFormer: num_heads must divide attention_size = {config.attention_size}, "
                f"got {config.num_heads}."
            )
        if config.attention_size == config.hidden_size and config.num_heads == 1:
            raise ValueError(
                "ModuleFormer: one head of the hidden size has no key and value projections in the "
                f"published code and is not supported, got attention_size {config.attention_size}."
            )
        self.assemble(
            config,
            (ModuleFormerBlock(config, config.experts_of(i)) for i in range(config.num_layers)),
            nn.LayerNorm(config.hidden_size),
            rope=None,
        )

    def reset_parameters(self) -> None:
        """Experts uniform in +-1/inputs; rows of cosine gates N(0, 1); other weights N(0,
        init_std); biases and temperatures 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 3:
                bound = 1 / parameter.shape[-1]
                nn.init.uniform_(parameter, -bound, bound)
            elif parameter.dim() == 2:
                rows = self.config.gate == "cosine" and name.endswith("router.weight")
                nn.init.normal_(parameter, std=1.0 if rows else self.config.init_std)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    def note_experts(self) -> None:
        """Writes the numbers of experts into the config, after layers were replaced."""
        found = tuple(
            (block.attention.router.num_experts, block.mlp.router.num_experts)
            for block in self.layers
        )
        attention, mlp = found[0]
        self.config = replace(
            self.config,
            num_attention_experts=max(a for a, _ in found),
            num_mlp_experts=max(m for _, m in found),
            experts_of_layers=None if set(found) == {(attention, mlp)} else found,
        )

    def entries(self) -> list[Entry]:
        found = [Entry("embed_tokens.weight", ("transformer.wte.weight",))]
        for i in range(self.config.num_layers):
            ours, theirs = f"layers.{i}", f"transformer.h.{i}"
            q, mlp = f"{theirs}.attn.q_proj", f"{theirs}.mlpf"
            found += renamed(f"{ours}.attention_norm", f"{theirs}.ln_1", _NORM)
            found += renamed(f"{ours}.attention.router", f"{q}.gate", _GATES[self.config.gate])
            for name in _NORM:
                keys = tuple(f"{theirs}.attn.{p}_proj.{name}" for p in "kv")
                found.append(Entry(f"{ours}.attention.kv_proj.{name}", keys, "rows"))
            found += renamed(f"{ours}.mlp_norm", f"{theirs}.ln_2", _NORM)
            found += renamed(f"{ours}.mlp.router", f"{mlp}.gate", _GATES[self.config.gate])
            # Their experts are [E, inputs, outputs].
            for name, key in (
                ("attention.w_query", f"{q}.experts.weight"),
                ("attention.w_output", f"{q}.output_experts.weight"),
                ("mlp.experts.w_gate_up", f"{mlp}.experts.weight"),
                ("mlp.experts.w_down", f"{mlp}.output_experts.weight"),
            ):
                found.append(Entry(f"{ours}.{name}", (key,), "transposed"))
        found += renamed("norm", "transformer.ln_f", _NORM)
        return [*found, Entry("lm_head.weight", ("lm_head.weight",))]

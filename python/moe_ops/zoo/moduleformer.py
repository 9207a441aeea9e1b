"""ModuleFormer: sparse attention and feed-forward modules that can be added and removed.

Shen et al. 2023, ModuleFormer: Modularity Emerges from Mixture-of-Experts, arXiv 2306.04640.

Letters: H hidden size, I intermediate size, E experts, K experts per token, n heads of an attention
expert, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from moe_ops._fields import Fields, check_divides
from moe_ops.layers import AttentionExperts, Experts, GateRouter, MoE

from ._presets import preset
from .lm.blocks import Step
from .lm.checkpoint import Entry, renamed
from .lm.config import OWN, LMConfig, number, size
from .lm.model import CausalLM

__all__ = ["ModuleFormer", "ModuleFormerConfig"]

# Our gate names -> names in the published config.
GATE_TYPES = {"mlp": "mlp", "linear": "linear", "cosine": "gmm"}


@dataclass(frozen=True)
class ModuleFormerConfig(LMConfig):
    """Sizes and options of a ModuleFormer.

    Attributes, beside those of `LMConfig`:
        num_heads, attention_size: n and n * d, of one attention expert.
        intermediate_size: I, of one feed-forward expert.
        num_attention_experts, num_mlp_experts: E of both kinds.
        top_k_attention, top_k_mlp: K of both kinds.
        gate, gate_size, gate_dropout, sample_top_k: see `moe_ops.layers.GateRouter`.
        mutual_information_coefficient, concentration_coefficient: of the losses, summed over both
            kinds of experts of all blocks. The first is for pre-training; the second for
            fine-tuning to a domain, where it gathers the load on few experts.
        init_std: of embedding and linear maps; experts are uniform in +-1/inputs.
        experts_of_layers: (attention, mlp) experts of every block if they differ from the numbers
            above, for example after pruning.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        "vocab_size": size("vocab_size"),
        "hidden_size": size("n_embd"),
        "num_layers": size("n_layer"),
        "num_heads": size("n_head"),
        "attention_size": size("att_hidden"),
        "intermediate_size": size("ffd_hidden"),
        "num_attention_experts": size("n_att_experts"),
        "num_mlp_experts": size("n_mlp_experts"),
        "top_k_attention": size("k_att"),
        "top_k_mlp": size("k_mlp"),
        "gate_size": size("gating_size", default=OWN),
        "gate_dropout": number("moe_pdrop", default=0.0, least=0),
        "sample_top_k": size("sample_topk", default=0, least=0),
        "mutual_information_coefficient": number("aux_loss_weight", default=0.0),
        "context": size("block_size", default=OWN),
        "init_std": number("initializer_range", default=OWN, least=0),
    }
    FIXED: ClassVar[dict[str, Any]] = {
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    }
    LOSSES = ("mutual_information", "concentration")

    vocab_size: int = 50_295
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 8
    attention_size: int = 512
    intermediate_size: int = 2048
    num_attention_experts: int = 16
    num_mlp_experts: int = 32
    top_k_attention: int = 2
    top_k_mlp: int = 2
    gate: str = "mlp"
    gate_size: int = 256
    gate_dropout: float = 0.0
    sample_top_k: int = 0
    mutual_information_coefficient: float = 0.0
    concentration_coefficient: float = 0.0
    context: int = 512
    init_std: float = 0.02
    experts_of_layers: tuple[tuple[int, int], ...] | None = None

    tiny = preset(
        "Bytes, two blocks, four and eight experts: trains on a CPU.",
        vocab_size=256,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        attention_size=32,
        intermediate_size=64,
        num_attention_experts=4,
        num_mlp_experts=8,
        gate_size=32,
        mutual_information_coefficient=0.01,
        context=128,
    )
    molm_350m_4b = preset("MoLM-350M-4B: 4 billion parameters, 350 million a token.")
    molm_700m_4b = preset(
        "MoLM-700M-4B: the same with twice the experts a token.",
        top_k_attention=4,
        top_k_mlp=4,
    )
    molm_700m_8b = preset("MoLM-700M-8B: twice the blocks.", num_layers=48)

    def aux_coefficients(self) -> dict[str, float]:
        """Returns the coefficients of the losses in use."""
        return {name: value for name, value in super().aux_coefficients().items() if value}

    def experts_of(self, layer: int) -> tuple[int, int]:
        """Returns the numbers of attention and feed-forward experts of a block."""
        if self.experts_of_layers is None:
            return self.num_attention_experts, self.num_mlp_experts
        attention, mlp = self.experts_of_layers[layer]
        return attention, mlp

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        gates = {theirs: ours for ours, theirs in GATE_TYPES.items()}
        return {"gate": gates[published.choice("gate_type", of=gates, default="mlp")]}

    @classmethod
    def from_published(cls, published: Mapping[str, Any], **overrides: Any) -> ModuleFormerConfig:
        config = super().from_published(published, **overrides)
        layers = config.experts_of_layers
        if layers is not None and len(layers) != config.num_layers:
            raise ValueError(
                f"{cls.__name__}: experts_of_layers must have a pair for each of "
                f"{config.num_layers} layers, got {len(layers)}."
            )
        return config

    def write_more(self) -> dict[str, Any]:
        return {
            "architectures": ["ModuleFormerForCausalLM"],
            "model_type": "moduleformer",
            "gate_type": GATE_TYPES[self.gate],
            "aux_loss_type": "mi",
            "history_length": self.context,
        }


# Router keys by the kind of gate.
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
    """Computes x + attention(norm(x)), then x + mlp(norm(x)). Stick-breaking attention has no
    positions; expert weights are not renormalized."""

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
    """The language model; see `CausalLM` for its methods.

    Layers of its blocks may be replaced by results of `append` and `select` of `MoE` and
    `AttentionExperts`; call `note_experts` afterwards.
    """

    config_class = ModuleFormerConfig
    ignored_keys = (r"attn\.mask", r"attn\.cum_weight")
    config: ModuleFormerConfig

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__()
        whole = config.attention_size
        check_divides("ModuleFormer", "num_heads", config.num_heads, "attention_size", whole)
        if config.attention_size == config.hidden_size and config.num_heads == 1:
            raise ValueError(
                "ModuleFormer: one head of the hidden size has no key and value projections in the "
                f"published code and is not supported, got attention_size {config.attention_size}."
            )
        layers = range(config.num_layers)
        blocks = (ModuleFormerBlock(config, config.experts_of(i)) for i in layers)
        self.assemble(config, blocks, None, nn.LayerNorm(config.hidden_size))

    def reset_parameters(self) -> None:
        """Draws experts uniformly in +-1/inputs, rows of cosine gates from N(0, 1) and other
        weights from N(0, init_std); biases and temperatures are 0, norms 1."""
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

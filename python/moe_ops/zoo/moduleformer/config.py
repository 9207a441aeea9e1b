"""Sizes, options and presets of ModuleFormer.

Letters: V vocabulary, H hidden size, I intermediate size, E experts, K experts a token, n heads of
an attention expert, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moe_ops._fields import Fields

from .._presets import preset
from ..lm.config import OWN, LMConfig, number, size

# Ours -> what the published config calls the gate.
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
        experts_of_layers: (attention, mlp) experts of every block where they differ from the
            numbers above, as they do after pruning.
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
        """The losses that are in use."""
        coefficients = {
            "mutual_information": self.mutual_information_coefficient,
            "concentration": self.concentration_coefficient,
        }
        return {name: value for name, value in coefficients.items() if value}

    def experts_of(self, layer: int) -> tuple[int, int]:
        """Attention and feed-forward experts of a block."""
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

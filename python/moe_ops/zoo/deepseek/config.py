"""Sizes, options and presets of DeepSeekMoE, and reading of the config.json of V1, V2 and V3.

Letters: V vocabulary, H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moe_ops._fields import Fields
from moe_ops.layers.rotary import Yarn

from .._presets import preset
from ..lm.config import LATENT_KEYS, LLAMA_KEYS, LMConfig, flag, number, size

MODEL_TYPES = ("deepseek", "deepseek_v2", "deepseek_v3")
ARCHITECTURES = dict(zip(MODEL_TYPES, ("Deepseek", "DeepseekV2", "DeepseekV3"), strict=True))


@dataclass(frozen=True)
class DeepSeekConfig(LMConfig):
    """Sizes and options of a DeepSeekMoE of any of the three generations.

    Attributes, beside those of `LMConfig`:
        num_layers: blocks; the first `num_dense_layers` have a dense network of width
            `dense_intermediate_size` instead of experts.
        num_heads: attention heads.
        latent: attention with latent keys and values (V2, V3) of the sizes `q_rank` (None: no
            bottleneck of the queries), `kv_rank`, `nope_size`, `rope_size` and `v_size`; False:
            plain attention (V1) with heads of `head_size`.
        rope_theta, rope_interleaved, yarn: see `moe_ops.layers.rotary.Rope`.
        intermediate_size: I, of one expert.
        num_experts, top_k: E routed experts, K of them per token.
        num_shared_experts: experts applied to every token.
        score_func: "softmax" (V1, V2) or "sigmoid" (V3).
        renormalize, routed_scaling_factor: see `moe_ops.layers.Router`.
        num_groups, num_topk_groups, group_score: groups of experts, and the groups available to a
            token.
        expert_bias: balance by a selection bias, which `moe_ops.layers.update_expert_bias` updates
            after each optimizer step.
        bias_update_rate: size of its updates.
        expert_balance_coefficient, device_balance_coefficient, sequence_balance_coefficient: of the
            losses, each summed over layers.
        num_devices: groups of the device loss.
        norm_eps: of all norms but those inside latent attention (1e-6).
        tie_embeddings: the embedding is also the output's weight.
    """

    # Entries that all three generations have.
    KEYS: ClassVar[dict[str, Any]] = {
        **LLAMA_KEYS,
        "num_dense_layers": size("first_k_dense_replace", default=0, least=0),
        "dense_intermediate_size": size("intermediate_size"),
        "num_heads": size("num_attention_heads"),
        "intermediate_size": size("moe_intermediate_size"),
        "num_experts": size("n_routed_experts"),
        "top_k": size("num_experts_per_tok"),
        "num_shared_experts": size("n_shared_experts", default=0, least=0),
        "routed_scaling_factor": number("routed_scaling_factor", default=1.0),
        "tie_embeddings": flag("tie_word_embeddings", default=False),
    }
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "moe_layer_freq": 1,
    }

    num_dense_layers: int = 1
    dense_intermediate_size: int = 128
    num_heads: int = 4
    latent: bool = True
    head_size: int = 16
    q_rank: int | None = None
    kv_rank: int = 32
    nope_size: int = 16
    rope_size: int = 8
    v_size: int = 16
    rope_theta: float = 10_000.0
    rope_interleaved: bool = True
    yarn: Yarn | None = None
    intermediate_size: int = 32
    num_experts: int = 16
    top_k: int = 4
    num_shared_experts: int = 1
    score_func: str = "softmax"
    renormalize: bool = False
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    num_topk_groups: int = 1
    group_score: str = "max"
    expert_bias: bool = False
    bias_update_rate: float = 1e-3
    expert_balance_coefficient: float = 0.0
    device_balance_coefficient: float = 0.0
    sequence_balance_coefficient: float = 0.0
    num_devices: int = 1
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    tiny = preset(
        "V3 in small: sigmoid scores, a selection bias, 4 groups of which a token uses 2.",
        score_func="sigmoid",
        renormalize=True,
        routed_scaling_factor=2.5,
        num_groups=4,
        num_topk_groups=2,
        group_score="top2_sum",
        expert_bias=True,
        bias_update_rate=1e-2,
        sequence_balance_coefficient=1e-4,
    )
    tiny_v1 = preset(
        "V1 in small: plain attention, softmax scores, losses of experts and devices.",
        latent=False,
        rope_interleaved=False,
        expert_balance_coefficient=0.01,
        device_balance_coefficient=0.05,
        num_devices=4,
    )
    tiny_v2 = preset(
        "V2 in small: latent attention, softmax scores, 4 groups of which a token uses 2.",
        q_rank=32,
        num_groups=4,
        num_topk_groups=2,
        routed_scaling_factor=4.0,
        expert_balance_coefficient=0.003,
        device_balance_coefficient=0.05,
        num_devices=4,
    )
    deepseek_moe_16b = preset(
        "DeepSeekMoE 16B (V1): 16.4 billion parameters, 2.8 billion a token.",
        vocab_size=102_400,
        hidden_size=2048,
        num_layers=28,
        dense_intermediate_size=10_944,
        num_heads=16,
        latent=False,
        head_size=128,
        rope_interleaved=False,
        intermediate_size=1408,
        num_experts=64,
        top_k=6,
        num_shared_experts=2,
        sequence_balance_coefficient=1e-3,
        context=4096,
        init_std=0.006,
    )
    v2 = preset(
        "DeepSeek-V2: 236 billion parameters, 21 billion a token.",
        vocab_size=102_400,
        hidden_size=5120,
        num_layers=60,
        dense_intermediate_size=12_288,
        num_heads=128,
        q_rank=1536,
        kv_rank=512,
        nope_size=128,
        rope_size=64,
        v_size=128,
        yarn=Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707),
        intermediate_size=1536,
        num_experts=160,
        top_k=6,
        num_shared_experts=2,
        routed_scaling_factor=16.0,
        num_groups=8,
        num_topk_groups=3,
        expert_balance_coefficient=0.003,
        device_balance_coefficient=0.05,
        num_devices=8,
        context=163_840,
        init_std=0.006,
    )
    v2_lite = v2.but(
        "DeepSeek-V2-Lite: 15.7 billion parameters, 2.4 billion a token.",
        hidden_size=2048,
        num_layers=27,
        dense_intermediate_size=10_944,
        num_heads=16,
        q_rank=None,
        intermediate_size=1408,
        num_experts=64,
        num_groups=1,
        num_topk_groups=1,
        num_devices=1,
        device_balance_coefficient=0.0,
        routed_scaling_factor=1.0,
    )
    v3 = v2.but(
        "DeepSeek-V3 and R1: 671 billion parameters, 37 billion a token.",
        vocab_size=129_280,
        hidden_size=7168,
        num_layers=61,
        num_dense_layers=3,
        dense_intermediate_size=18_432,
        yarn=Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        intermediate_size=2048,
        num_experts=256,
        top_k=8,
        num_shared_experts=1,
        score_func="sigmoid",
        renormalize=True,
        routed_scaling_factor=2.5,
        num_topk_groups=4,
        group_score="top2_sum",
        expert_bias=True,
        expert_balance_coefficient=0.0,
        device_balance_coefficient=0.0,
        num_devices=1,
        sequence_balance_coefficient=1e-4,
    )

    def aux_coefficients(self) -> dict[str, float]:
        """Returns the coefficients of the losses in use."""
        coefficients = {
            "load_balancing": self.expert_balance_coefficient,
            "device_balance": self.device_balance_coefficient,
            "sequence_balance": self.sequence_balance_coefficient,
        }
        return {name: value for name, value in coefficients.items() if value}

    @property
    def model_type(self) -> str:
        """Returns the model type in config.json: the generation with this attention and
        balancing."""
        if not self.latent:
            return MODEL_TYPES[0]
        return MODEL_TYPES[2] if self.expert_bias else MODEL_TYPES[1]

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        """Reads fields whose names or meaning depend on the generation."""
        kind = published.choice("model_type", of=MODEL_TYPES)
        latent, biased = kind != "deepseek", kind == "deepseek_v3"
        fields: dict[str, Any] = {
            "latent": latent,
            "rope_interleaved": latent and published.flag("rope_interleave", default=True),
            "score_func": published.choice(
                "scoring_func",
                of=("softmax", "sigmoid"),
                default="sigmoid" if biased else "softmax",
            ),
            # The V2 code in transformers never renormalizes, and no V2 checkpoint requests it.
            "renormalize": kind != "deepseek_v2"
            and published.flag("norm_topk_prob", default=False),
            "group_score": "top2_sum" if biased else "max",
            "expert_bias": biased,
        }
        if latent:
            fields |= {name: key.read(published, None) for name, key in LATENT_KEYS.items()}
        else:
            width = published.size("hidden_size") // published.size("num_attention_heads")
            fields["head_size"] = published.size("head_dim", default=width)
        if biased or published.values.get("topk_method") == "group_limited_greedy":
            fields |= {
                "num_groups": published.size("n_group", default=1),
                "num_topk_groups": published.size("topk_group", default=1),
            }
        if "aux_loss_alpha" in published:
            name = "sequence" if published.flag("seq_aux", default=True) else "expert"
            fields[f"{name}_balance_coefficient"] = published.number("aux_loss_alpha")
        return fields

    def write_more(self) -> dict[str, Any]:
        """Returns the entries that `read_more` reads, and those that only other readers need."""
        kind = self.model_type
        published: dict[str, Any] = {
            "architectures": [f"{ARCHITECTURES[kind]}ForCausalLM"],
            "model_type": kind,
            "num_key_value_heads": self.num_heads,
            "scoring_func": self.score_func,
            "norm_topk_prob": self.renormalize,
            "n_group": self.num_groups,
            "topk_group": self.num_topk_groups,
            "topk_method": "group_limited_greedy" if self.num_groups > 1 else "greedy",
        }
        by_sequence = self.sequence_balance_coefficient > 0
        coefficient = self.expert_balance_coefficient
        if by_sequence:
            coefficient = self.sequence_balance_coefficient
        if coefficient:
            published |= {"seq_aux": by_sequence, "aux_loss_alpha": coefficient}
        if self.expert_bias:
            published |= {"topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
        if not self.latent:
            return published | {"head_dim": self.head_size}
        published["rope_interleave"] = self.rope_interleaved
        return published | {key.names[0]: getattr(self, n) for n, key in LATENT_KEYS.items()}

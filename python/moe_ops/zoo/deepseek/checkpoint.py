"""Published checkpoints of DeepSeek V1, V2 and V3: config.json and the keys of tensors."""

from __future__ import annotations

from typing import Any

from moe_ops._fields import Fields
from moe_ops.layers import SharedExperts

from ..lm.blocks import attention_entries
from ..lm.checkpoint import Entry, dense_entries, expert_entries
from ..lm.config import LATENT_KEYS, LLAMA_KEYS, flag, number, size

MODEL_TYPES = ("deepseek", "deepseek_v2", "deepseek_v3")
ARCHITECTURES = dict(zip(MODEL_TYPES, ("Deepseek", "DeepseekV2", "DeepseekV3"), strict=True))
# What all three generations have.
KEYS = {
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
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1}


def read_generation(published: Fields) -> dict[str, Any]:
    """Fields of the config whose names or meaning depend on the generation."""
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
        # The code of V2 in transformers never renormalises, and no V2 checkpoint asks for it.
        "renormalize": kind != "deepseek_v2" and published.flag("norm_topk_prob", default=False),
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


def generation(config: Any) -> str:
    """What config.json calls a model: the generation that has its attention and its balancing."""
    if not config.latent:
        return MODEL_TYPES[0]
    return MODEL_TYPES[2] if config.expert_bias else MODEL_TYPES[1]


def write_generation(config: Any) -> dict[str, Any]:
    """The entries that `read_generation` reads, and those that only other readers want."""
    kind = generation(config)
    published: dict[str, Any] = {
        "architectures": [f"{ARCHITECTURES[kind]}ForCausalLM"],
        "model_type": kind,
        "num_key_value_heads": config.num_heads,
        "scoring_func": config.score_func,
        "norm_topk_prob": config.renormalize,
        "n_group": config.num_groups,
        "topk_group": config.num_topk_groups,
        "topk_method": "group_limited_greedy" if config.num_groups > 1 else "greedy",
    }
    by_sequence = config.sequence_balance_coefficient > 0
    coefficient = config.expert_balance_coefficient
    if by_sequence:
        coefficient = config.sequence_balance_coefficient
    if coefficient:
        published |= {"seq_aux": by_sequence, "aux_loss_alpha": coefficient}
    if config.expert_bias:
        published |= {"topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
    if not config.latent:
        return published | {"head_dim": config.head_size}
    published["rope_interleave"] = config.rope_interleaved
    return published | {key.names[0]: getattr(config, n) for n, key in LATENT_KEYS.items()}


def block_entries(block: Any, config: Any, ours: str, theirs: str) -> list[Entry]:
    """The tensors of a block with their keys."""
    entries = attention_entries(block, ours, theirs)
    if isinstance(block.mlp, SharedExperts):
        return entries + dense_entries(f"{ours}.mlp", f"{theirs}.mlp")
    entries.append(Entry(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.gate.weight",)))
    if config.expert_bias:
        key = f"{theirs}.mlp.gate.e_score_correction_bias"
        entries.append(Entry(f"{ours}.mlp.router.expert_bias", (key,)))
    entries += expert_entries(f"{ours}.mlp.experts", f"{theirs}.mlp.experts", config.num_experts)
    if block.mlp.shared_experts is not None:
        entries += dense_entries(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts")
    return entries

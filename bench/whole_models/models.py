"""Random models of the published kinds, of about a billion parameters or tiny."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tests.helpers.quantized import weight_config
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPS = {"n_group": 1, "topk_group": 1}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON,
        "intermediate_size": 1024,
        "moe_intermediate_size": 384,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "mixtral": {
        **_COMMON,
        "intermediate_size": 3072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 11,
    },
    "gpt_oss": {
        **_COMMON,
        "intermediate_size": 1024,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 9,
        "sliding_window": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "deepseek_v3": {
        **_COMMON,
        **_GROUPS,
        "num_key_value_heads": 16,
        "q_lora_rank": 384,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "head_dim": 32,
        "intermediate_size": 2816,
        "moe_intermediate_size": 384,
        "n_routed_experts": 64,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
}
# Every path in seconds: what `--tiny` makes of the sizes above. Blocks of 4-bit weights divide it.
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
}


def config_of(name: str, tiny: bool = False) -> Any:
    sizes = dict(MODELS[name])
    if tiny:
        sizes |= {key: value for key, value in _TINY.items() if key in sizes}
        if name == "deepseek_v3":
            sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return AutoConfig.for_model(name, **sizes)


def build(name: str, folder: Path, tiny: bool = False) -> int:
    """Saves a model in bfloat16 with weights of seed 0; returns the number of its parameters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, tiny), dtype=torch.bfloat16)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.normal_(1.0, 0.1)
            elif p.dim() == 1 or key.endswith("proj_bias"):
                p.normal_(0.0, 0.1)
            elif "embed" in key:
                p.normal_(0.0, 1.0)
            else:
                # Layers add little to the stream, as in trained models: a token that turns to
                # another expert by rounding changes little.
                adds = "down_proj" in key or "o_proj" in key
                p.normal_(0.0, (0.2 if adds else 1.0) * p.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def quantize(folder: Path, weights: str) -> None:
    """Saves the model of a folder in "int8" or "int4" in a folder of that name inside it."""
    import moe_ops.hf

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="moe_ops"
    )
    moe_ops.hf.optimize(model, quantization=weight_config(weights))
    model.save_pretrained(folder / weights)


if __name__ == "__main__":  # folder weights
    quantize(Path(sys.argv[1]), sys.argv[2])

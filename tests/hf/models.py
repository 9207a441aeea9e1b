"""Tiny random models of the thirteen model types, each with every branch of its block in use."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

from moe_ops.hf.models.cache_argument import cache_name

VOCAB = 64
CACHE = cache_name(MixtralForCausalLM.forward)

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
CONFIGS: dict[str, dict] = {
    "mixtral": {**COMMON, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **COMMON,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
    },
    "qwen3_moe": {
        **COMMON,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "olmoe": {**COMMON, "num_experts": 6, "num_experts_per_tok": 3},
    "deepseek_v2": {**COMMON, **MLA, **GROUPED, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**COMMON, **MLA, **GROUPED},
    "glm4_moe": {**COMMON, **GROUPED, "head_dim": 8},
    "granitemoe": {
        **COMMON,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.8,
        "logits_scaling": 1.2,
    },
    "gpt_oss": {
        **COMMON,
        "head_dim": 8,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "swiglu_limit": 1.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "phimoe": {**COMMON, "num_local_experts": 6, "num_experts_per_tok": 2},
    "jetmoe": {**COMMON, "kv_channels": 8, "num_local_experts": 6, "num_experts_per_tok": 2},
    "dbrx": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "pad_token_id": 0,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "llama4_text": {
        **COMMON,
        "head_dim": 8,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layers": [1],
        "attention_chunk_size": 16,
    },
}
MODEL_TYPES = tuple(CONFIGS)
# Added to the scores that experts are chosen by; a parameter or a buffer.
ROUTER_BIASES = ("e_score_correction_bias", "expert_bias")
# Models with the routing of 2026, which tests of their own run (test_newer_models.py): tables of
# token ids and clamped gates; experts that return their input; experts in a latent width; linear
# attention beside experts.
NEWER: dict[str, dict] = {
    "deepseek_v4": {
        **COMMON,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "layer_types": ["sliding_attention"] * 2,
        "mlp_layer_types": ["hash_moe", "moe"],
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
        "num_nextn_predict_layers": 0,
    },
    "longcat_flash": {
        **COMMON,
        **MLA,
        "num_layers": 1,
        "ffn_hidden_size": 24,
        "expert_ffn_hidden_size": 20,
        "n_routed_experts": 6,
        "zero_expert_num": 3,
        "moe_topk": 4,
        "routed_scaling_factor": 1.5,
    },
    "nemotron_h": {
        **COMMON,
        "head_dim": 8,
        "layers_block_type": ["attention", "moe"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 20,
        "moe_latent_size": 16,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "kimi_linear": {
        **COMMON,
        **MLA,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
}
for _ignored in ("longcat_flash", "nemotron_h"):  # They count their layers themselves.
    del NEWER[_ignored]["num_hidden_layers"]
# Blocks outside transformers' experts interface.
UNDECORATED = ("jetmoe", "dbrx", "llama4_text")
DECORATED = tuple(name for name in MODEL_TYPES if name not in UNDECORATED)
# Where the MoE block of the last layer is, and how many blocks the model has.
BLOCK_NAMES = dict.fromkeys(MODEL_TYPES, "model.layers.1.mlp") | {
    "granitemoe": "model.layers.1.block_sparse_moe",
    "dbrx": "transformer.blocks.1.ffn",
    "llama4_text": "model.layers.1.feed_forward",
}
NUM_BLOCKS = dict.fromkeys(MODEL_TYPES, 2) | {
    "jetmoe": 4,  # Attention has experts too.
    "deepseek_v2": 1,
    "deepseek_v3": 1,
    "glm4_moe": 1,
    "llama4_text": 1,
}
# Of these the ones whose experts are feed-forward networks, which pack and quantize.
NUM_FFNS = NUM_BLOCKS | {"jetmoe": 2}


def build(
    model_type: str, experts: str = "eager", dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A model in eval mode whose weights, seeded by nothing but 0, make every branch matter.

    Every parameter is redrawn: transformers leaves some uninitialized and others tiny, and zero
    biases would hide a forgotten one.
    """
    config = AutoConfig.for_model(model_type, **{**(CONFIGS | NEWER)[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation=experts, attn_implementation="eager"
    )
    draw_weights(model)
    return model.to(dtype).eval()


@torch.no_grad()
def draw_weights(model: PreTrainedModel, seed: int = 0) -> None:
    """Draws every parameter, and the buffers that models store their router's tables in."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(ROUTER_BIASES):
            tensor.normal_(-0.2, 0.2, generator=generator)
        elif name.endswith("tid2eid"):  # Distinct experts for each token id.
            draws = torch.rand(len(tensor), model.config.num_local_experts, generator=generator)
            tensor.copy_(draws.argsort(1)[:, : tensor.shape[1]])
        elif "inv_freq" in name or not isinstance(tensor, torch.nn.Parameter):
            continue
        elif "norm" in name and tensor.dim() == 1:
            tensor.normal_(1.0, 0.1, generator=generator)
        elif tensor.dim() == 1 or name.endswith("proj_bias"):
            tensor.normal_(0.0, 0.3, generator=generator)
        elif tensor.numel():
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


@functools.cache
def router_is_unknown(model_type: str) -> bool:
    """Returns True for Granite in transformers 5.20 and before: its router returned ids, weights
    and logits, in this order, and nothing takes its place."""
    if model_type != "granitemoe":
        return False
    block = build(model_type).model.layers[0].block_sparse_moe
    with torch.no_grad():
        return not block.router(torch.randn(4, 32))[0].is_floating_point()


def skip_unknown_router(model_type: str) -> None:
    """Ends a test of what only a known router has."""
    if router_is_unknown(model_type):
        pytest.skip("Granite's router returns its results in another order in this transformers")


def tokens(batch: int = 2, length: int = 13) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def loss_and_gradients(
    model: PreTrainedModel, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, logits and the gradient of every parameter that has one."""
    model.zero_grad()
    output = model(input_ids=input_ids, labels=input_ids, use_cache=False)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.logits.detach(), gradients

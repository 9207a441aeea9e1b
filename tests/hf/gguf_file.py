"""A tiny GGUF file of a Qwen3-MoE, and the float model that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.helpers import published as layout
from transformers import AutoConfig, AutoModelForCausalLM

# Types of gate, up and down, a layer each, and what the banks are called.
LAYERS = (("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q8_0", "Q8_0"), ("Q4_0", "Q4_0", "Q4_0"))
# Of experts; transformers takes every Qwen3-MoE of a file for one of 768.
WIDTH = 512
KINDS = ("q4_k, q6_k", "int8 g32 float16", "int4 g32 float16")


def write_gguf(gguf: Any, path: Path) -> tuple[Any, tuple[str, ...]]:
    """Writes it by the package gguf; returns the float model and the names of its formats."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=2,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    writer.add_block_count(len(LAYERS))
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(2)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(64)
    plain = {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
    }
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }
    for i, kinds in enumerate(LAYERS):
        plain |= {f"blk.{i}.{name}": f"model.layers.{i}.{part}" for name, part in parts.items()}
        experts, halves = model.model.layers[i].mlp.experts, []
        for part, kind in zip(("gate", "up", "down"), kinds, strict=True):
            rows, columns = (256, WIDTH) if part == "down" else (WIDTH, 256)
            data = layout.random_ggml(kind, 2 * rows, columns)
            number = getattr(gguf.GGMLQuantizationType, kind)
            value = torch.from_numpy(gguf.quants.dequantize(data.numpy(), number))
            halves.append(value.view(2, rows, columns).float())
            stacked = data.view(2, rows, -1).numpy()
            writer.add_tensor(f"blk.{i}.ffn_{part}_exps.weight", stacked, raw_dtype=number)
        with torch.no_grad():
            experts.gate_up_proj.copy_(torch.cat(halves[:2], 1))
            experts.down_proj.copy_(halves[2])
    state = model.state_dict()
    for name, source in plain.items():
        writer.add_tensor(f"{name}.weight", state[f"{source}.weight"].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, KINDS

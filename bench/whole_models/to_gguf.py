"""The weights of a transformers model in GGUF, so that llama.cpp computes with the same numbers.

    pip install gguf

Names and layouts are those that llama.cpp's architectures ask for: experts stacked, gate and up
apart; Mixtral's queries and keys with the rotated pairs of features side by side; gpt-oss's gate
and up taken from even and odd rows; DeepSeek's projection to keys and values as two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
    "deepseek_v3": "deepseek2",
}
_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}


def write(model: Any, path: Path) -> None:
    """Writes matrices in bfloat16 and vectors in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[config.model_type])
    _describe(writer, config)
    layers = {"qwen3_moe": _qwen3_moe, "mixtral": _mixtral}
    layers |= {"gpt_oss": _gpt_oss, "deepseek_v3": _deepseek_v3}
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in _tensors(state, config, layers[config.model_type]):
        tensor = tensor.detach().contiguous()
        # The router stays in float32, as llama.cpp's own conversion has it.
        if tensor.dim() == 1 or "ffn_gate_inp" in name or name.endswith("bias"):
            writer.add_tensor(name, tensor.float().numpy())
        else:
            codes = tensor.bfloat16().view(torch.uint16).numpy()
            writer.add_tensor(name, codes.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Any) -> None:
    kind = config.model_type
    writer.add_name(kind)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if kind == "deepseek_v3":
        _describe_deepseek(writer, config)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_expert_feed_forward_length(config.intermediate_size)


def _describe_deepseek(writer: Any, config: Any) -> None:
    import gguf

    rope, rank = config.qk_rope_head_dim, config.kv_lora_rank
    # Attention in the compressed space: one head of keys and values for all.
    writer.add_head_count_kv(1)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


def _tensors(
    state: dict[str, Tensor], config: Any, layer: Callable[..., Iterator[tuple[str, Tensor]]]
) -> Iterator[tuple[str, Tensor]]:
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    yield "output.weight", state["lm_head.weight"]
    for n in range(config.num_hidden_layers):
        prefix = f"model.layers.{n}."
        own = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        for name, tensor in layer(own, config):
            yield f"blk.{n}.{name}", tensor


def _norms(own: dict[str, Tensor], after: str = "ffn_norm") -> Iterator[tuple[str, Tensor]]:
    yield "attn_norm.weight", own["input_layernorm.weight"]
    yield f"{after}.weight", own["post_attention_layernorm.weight"]


def _experts(gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2, dim=1)
    yield "ffn_gate_exps.weight", gate
    yield "ffn_up_exps.weight", up
    yield "ffn_down_exps.weight", down


def _qwen3_moe(own: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    yield from _norms(own)
    for theirs, name in _ATTENTION.items():
        yield f"{name}.weight", own[f"self_attn.{theirs}.weight"]
    for part in ("q", "k"):
        yield f"attn_{part}_norm.weight", own[f"self_attn.{part}_norm.weight"]
    yield "ffn_gate_inp.weight", own["mlp.gate.weight"]
    yield from _experts(own["mlp.experts.gate_up_proj"], own["mlp.experts.down_proj"])


def _mixtral(own: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    yield from _norms(own)
    for theirs, name in _ATTENTION.items():
        weight = own[f"self_attn.{theirs}.weight"]
        if theirs in ("q_proj", "k_proj"):  # Halves of a head to pairs of neighbors.
            heads = weight.shape[0] // config.head_dim
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).flatten(0, 2)
        yield f"{name}.weight", weight
    yield "ffn_gate_inp.weight", own["mlp.gate.weight"]
    yield from _experts(own["mlp.experts.gate_up_proj"], own["mlp.experts.down_proj"])


def _gpt_oss(own: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    yield from _norms(own, "post_attention_norm")
    for theirs, name in _ATTENTION.items():
        for part in ("weight", "bias"):
            yield f"{name}.{part}", own[f"self_attn.{theirs}.{part}"]
    yield "attn_sinks.weight", own["self_attn.sinks"]
    for part in ("weight", "bias"):
        yield f"ffn_gate_inp.{part}", own[f"mlp.router.{part}"]
    gate_up = own["mlp.experts.gate_up_proj"].transpose(1, 2)  # [E, 2I, H], interleaved
    yield "ffn_gate_exps.weight", gate_up[:, 0::2]
    yield "ffn_up_exps.weight", gate_up[:, 1::2]
    yield "ffn_down_exps.weight", own["mlp.experts.down_proj"].transpose(1, 2)
    bias = own["mlp.experts.gate_up_proj_bias"]
    yield "ffn_gate_exps.bias", bias[:, 0::2]
    yield "ffn_up_exps.bias", bias[:, 1::2]
    yield "ffn_down_exps.bias", own["mlp.experts.down_proj_bias"]


def _deepseek_v3(own: dict[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    yield from _norms(own)
    for theirs, name in {
        "q_a_proj": "attn_q_a",
        "q_a_layernorm": "attn_q_a_norm",
        "q_b_proj": "attn_q_b",
        "kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "kv_a_layernorm": "attn_kv_a_norm",
        "o_proj": "attn_output",
    }.items():
        yield f"{name}.weight", own[f"self_attn.{theirs}.weight"]
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    kv_b = own["self_attn.kv_b_proj.weight"].view(-1, nope + value, config.kv_lora_rank)
    yield "attn_k_b.weight", kv_b[:, :nope].transpose(1, 2)
    yield "attn_v_b.weight", kv_b[:, nope:]
    if "mlp.gate_proj.weight" in own:
        for part in ("gate", "up", "down"):
            yield f"ffn_{part}.weight", own[f"mlp.{part}_proj.weight"]
        return
    yield "ffn_gate_inp.weight", own["mlp.gate.weight"]
    yield "exp_probs_b.bias", own["mlp.gate.e_score_correction_bias"]
    yield from _experts(own["mlp.experts.gate_up_proj"], own["mlp.experts.down_proj"])
    for part in ("gate", "up", "down"):
        yield f"ffn_{part}_shexp.weight", own[f"mlp.shared_experts.{part}_proj.weight"]

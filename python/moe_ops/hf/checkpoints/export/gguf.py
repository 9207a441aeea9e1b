"""GGUF files of whole models, for llama.cpp and the programs on it. The package gguf writes them.

E experts, H hidden size, I intermediate size, O and D output and input features of a weight.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_ops import _files
from moe_ops.quant.published import StoredWeight
from moe_ops.quant.rounding import search_int4, search_q4_k
from moe_ops.quant.to_published import decoded, ggml_type_of, select_rows, to_ggml
from moe_ops.weight_formats import WeightFormat

from .gguf_vocabulary import add_vocabulary
from .source import PARTS, Entry, Experts, Source, Weight, floats_of

# model_type of transformers -> architecture of llama.cpp.
ARCHITECTURES = {
    "qwen3_moe": "QWEN3MOE",
    "qwen2_moe": "QWEN2MOE",
    "olmoe": "OLMOE",
    "mixtral": "LLAMA",
    "gpt_oss": "GPT_OSS",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
}
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "mxfp4")
_FLOAT_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FOUR_BITS = ("Q4_0", "Q4_K", "MXFP4")
_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_K": "MOSTLY_Q4_K_M",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}


class _Planned(NamedTuple):
    """A tensor of the file: name, shape in the order of torch, type, and what makes its data."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Callable[[], np.ndarray]


def write_gguf(source: Source, path: Path, kind: str | None, dense: str | None) -> dict[str, str]:
    """Writes a model as one file.

    Args:
        source: the model.
        path: of the file.
        kind: one of TYPES for experts; None keeps the codes of quantized weights and the types of
            floats.
        dense: one of TYPES for dense layers; None is that of experts.

    Returns:
        Name of each tensor of the file -> its type.

    Raises:
        ValueError: a model that llama.cpp cannot run, or weights that no type holds.
        ImportError: the package gguf is missing.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ImportError(
            "export needs the package gguf for GGUF files: pip install torch-moe-ops[gguf]"
        ) from error

    _check_types(kind, dense)
    _check_model(source)
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[source.config.model_type])
    plan = list(_plan(source, arch, kind, dense or kind))
    with _files.Replacement(_files.make_folder(path.parent)) as files:
        new = files.staging() / path.name
        writer = gguf.GGUFWriter(str(new), gguf.MODEL_ARCH_NAMES[arch])
        try:
            _describe(writer, source, plan)
            add_vocabulary(writer, source)
            for tensor in plan:
                number = getattr(gguf.GGMLQuantizationType, tensor.kind)
                size = math.prod(tensor.shape)
                block, width = gguf.GGML_QUANT_SIZES[number]
                # The type of the array only says that the shape is in elements.
                writer.add_tensor_info(
                    tensor.name, tensor.shape, np.dtype(np.float32), size // block * width, number
                )
            with _files.sentence(path):
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for tensor in plan:
                    writer.write_tensor_data(tensor.data())
        finally:
            writer.close()
        files.adopt(path.name, new)
    return {tensor.name: tensor.kind for tensor in plan}


def _check_types(kind: str | None, dense: str | None) -> None:
    for name, value in (("format", kind), ("dense", dense)):
        if value is not None and value not in TYPES:
            raise ValueError(
                f"export: {name} must have one of the types {', '.join(TYPES)} for GGUF, got "
                f"{value!r}."
            )


def _check_model(source: Source) -> None:
    config = source.config
    kind = config.model_type
    if len({one.num_experts for one in source.experts}) != 1:
        counts = sorted({one.num_experts for one in source.experts})
        raise ValueError(f"export: layers must have one number of experts for GGUF, got {counts}.")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"export: the model must be of one of {', '.join(ARCHITECTURES)} for GGUF, got {kind}."
        )

    def refuse(name: str, wanted: Any, got: Any) -> None:
        raise ValueError(
            f"export: {name} of a {kind} model must be {wanted} for llama.cpp, got {got}."
        )

    norm = getattr(config, "norm_topk_prob", None)
    fixed = {"qwen3_moe": True, "qwen2_moe": False, "olmoe": False}
    if kind in fixed and norm != fixed[kind]:
        refuse("norm_topk_prob", fixed[kind], norm)
    if kind == "deepseek_v2" and getattr(config, "topk_method", "greedy") != "greedy":
        refuse("topk_method", "greedy", config.topk_method)
    if kind == "mixtral" and getattr(config, "sliding_window", None):
        refuse("sliding_window", None, config.sliding_window)
    if kind == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        refuse("num_key_value_heads", config.num_attention_heads, config.num_key_value_heads)
    if kind == "olmoe" and getattr(config, "clip_qkv", None):
        refuse("clip_qkv", None, config.clip_qkv)
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ("default", "linear", "yarn"):
        refuse("rope_type", "default, linear or yarn", rope)
    layers = {one.layer for one in source.experts}
    first = config.first_k_dense_replace if kind.startswith("deepseek") else 0
    missing = sorted(set(range(first, config.num_hidden_layers)) - layers)
    if missing:
        refuse("every layer", "one with experts", f"layer {missing[0]} without")


# ------------------------------------------------------------------------------------ metadata


def _describe(writer: Any, source: Source, plan: list[_Planned]) -> None:
    import gguf

    config = source.config
    kind = config.model_type
    writer.add_name(source.folder.name if source.folder is not None else kind)
    most = max(plan, key=lambda tensor: math.prod(tensor.shape)).kind
    file_type = getattr(gguf.LlamaFileType, _FILE_TYPES.get(most, ""), None)
    writer.add_file_type(gguf.LlamaFileType.GUESSED if file_type is None else file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _describe_rope(writer, config)
    writer.add_expert_count(source.experts[0].num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if kind.startswith("deepseek"):
        _describe_deepseek(writer, config)
        return
    head_size = _head_size(config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    if kind != "mixtral":
        writer.add_expert_feed_forward_length(source.experts[0].intermediate_size)
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if kind == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return size


def _describe_rope(writer: Any, config: Any) -> None:
    import gguf

    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(length)
        for name, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _describe_deepseek(writer: Any, config: Any) -> None:
    import gguf

    rope, rank = config.qk_rope_head_dim, config.kv_lora_rank
    third = config.model_type == "deepseek_v3"
    # Attention in the compressed space: one head of keys and values for all.
    writer.add_head_count_kv(1)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rope)
    writer.add_value_length_mla(config.v_head_dim)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(third and config.norm_topk_prob)
    functions = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(functions.SIGMOID if third else functions.SOFTMAX)
    if third:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


# ------------------------------------------------------------------------------------- tensors


def _plan(source: Source, arch: Any, kind: str | None, dense: str | None) -> Iterator[_Planned]:
    import gguf

    config = source.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    four_bits = (dense or "").upper() in _FOUR_BITS
    for entry in source.entries.values():
        if "rotary_emb" in entry.name:
            continue
        if entry.name.endswith("kv_b_proj.weight"):
            yield from _latents(entry, config, dense)
            continue
        theirs = names.get_name(_known_name(entry.name), try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(
                f"export: every tensor must have a name in llama.cpp, got {entry.name}."
            )
        theirs = theirs if theirs.endswith((".weight", ".bias")) else f"{theirs}.weight"
        wanted = dense
        if theirs in ("token_embd.weight", "output.weight") and four_bits:
            wanted = "q8_0"  # As other programs have them in wider types too.
        yield _dense(entry, theirs, wanted, config)
    for experts in source.experts:
        for part in PARTS:
            yield _stacked(experts, part, kind)
            if part in experts.biases:
                name = f"blk.{experts.layer}.ffn_{part}_exps.bias"
                shape = (experts.num_experts, experts.shape(part)[0])
                yield _Planned(name, shape, "F32", _floats(experts.biases[part]))


def _known_name(name: str) -> str:
    """Returns the name as gguf's table has it."""
    return name.replace("e_score_correction_bias", "e_score_correction.bias")


def _floats(read: Callable[[], Weight]) -> Callable[[], np.ndarray]:
    return lambda: floats_of(read()).float().contiguous().numpy()


def _dense(entry: Entry, name: str, wanted: str | None, config: Any) -> _Planned:
    vector = len(entry.shape) != 2 or re.search(r"ffn_gate_inp", name) is not None
    if vector:  # Norms, biases and routers stay in float32.
        if name.endswith("ffn_gate_inp_shexp.weight"):
            return _Planned(name, entry.shape[1:], "F32", lambda: _floats(entry.read)()[0])
        return _Planned(name, entry.shape, "F32", _floats(entry.read))
    kind = _fitting(wanted, entry.format, entry.dtype, entry.shape[1], entry.name)
    order = _rotated_rows(entry, config)

    def data() -> np.ndarray:
        weight = entry.read()
        if order is not None:
            if isinstance(weight, StoredWeight) and weight.format.name != "fp8":
                weight = select_rows(weight, order)
            else:
                weight = floats_of(weight)[order]
        return _encoded(weight, kind, entry.importance)

    return _Planned(name, entry.shape, kind, data)


def _rotated_rows(entry: Entry, config: Any) -> Tensor | None:
    """Returns the order of Mixtral's queries and keys, whose rotated pairs of features llama.cpp
    wants side by side."""
    if config.model_type != "mixtral" or not entry.name.endswith(
        ("q_proj.weight", "k_proj.weight")
    ):
        return None
    rotated = torch.arange(entry.shape[0]).view(-1, 2, _head_size(config) // 2)
    return rotated.transpose(1, 2).flatten()


def _latents(entry: Entry, config: Any, wanted: str | None) -> Iterator[_Planned]:
    """DeepSeek's projection of latents to keys and values, as one for each, in float32 or bfloat16:
    llama.cpp aborts with quantized ones and with float16 on some CPUs."""
    kind = (wanted or "").upper()
    kind = kind if kind in _FLOAT_TYPES.values() else _FLOAT_TYPES[entry.dtype]
    kind = "F32" if kind == "F16" else kind
    layer = re.findall(r"\d+", entry.name)[0]
    nope, value, rank = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    heads = config.num_attention_heads

    def part(keys: bool, kind: str) -> np.ndarray:
        whole = floats_of(entry.read()).view(-1, nope + value, rank)
        return _encoded(whole[:, :nope].mT if keys else whole[:, nope:], kind, None)

    for name, shape, keys in (
        ("attn_k_b", (heads, rank, nope), True),
        ("attn_v_b", (heads, value, rank), False),
    ):
        data = functools.partial(part, keys, kind)
        yield _Planned(f"blk.{layer}.{name}.weight", shape, kind, data)


def _stacked(experts: Experts, part: str, wanted: str | None) -> _Planned:
    """One projection of all experts of a layer."""
    shape = (experts.num_experts, *experts.shape(part))
    name = f"blk.{experts.layer}.ffn_{part}_exps.weight"
    kind = _fitting(wanted, experts.formats.get(part), experts.dtype, shape[2], experts.prefix)
    matters = experts.importance.get(part)

    def data() -> np.ndarray:
        first = None
        for e in range(experts.num_experts):
            one = _encoded(experts.read(e, part), kind, None if matters is None else matters[e])
            if first is None:
                first = np.empty((experts.num_experts, *one.shape), one.dtype)
            first[e] = one
        assert first is not None
        return first

    return _Planned(name, shape, kind, data)


def _fitting(
    wanted: str | None, held: WeightFormat | None, dtype: torch.dtype, depth: int, name: str
) -> str:
    """Returns the type of a tensor with rows of `depth` weights."""
    if wanted is None:
        if held is None:
            return _FLOAT_TYPES[dtype]
        kind = ggml_type_of(held)
        if kind is None:
            raise ValueError(
                f"export: format must name a type, as gguf:q8_0 does, for weights that no type of "
                f"GGUF holds as they are, got {held.label} in {name}."
            )
        return kind
    import gguf

    kind = wanted.upper()
    block, _ = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, kind)]
    if depth % block == 0:
        return kind
    return "Q8_0" if depth % 32 == 0 else "F16"


def _encoded(weight: Weight, kind: str, importance: Tensor | None) -> np.ndarray:
    """Returns a weight [..., O, D] as a type stores it: the same codes where it has them."""
    if isinstance(weight, StoredWeight):
        if ggml_type_of(weight.format) == kind:
            return to_ggml(weight).numpy()
        weight = decoded(weight)
    if kind in ("F32", "F16"):
        dtype = torch.float32 if kind == "F32" else torch.float16
        return weight.to(dtype).contiguous().numpy()
    if kind == "BF16":
        return weight.bfloat16().contiguous().view(torch.uint8).numpy()
    if kind == "Q4_K":
        return to_ggml(search_q4_k(weight, importance)).numpy()
    if kind == "Q4_0" and importance is not None:
        return to_ggml(search_int4(weight, 32, importance, torch.float16)).numpy()
    import gguf

    number = getattr(gguf.GGMLQuantizationType, kind)
    encoded: np.ndarray = gguf.quants.quantize(weight.float().contiguous().numpy(), number)
    return encoded

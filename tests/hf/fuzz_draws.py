"""Draws of whole models: a family, sizes, options of its configuration, and scales of weights.

The options are those of the configuration classes themselves: every field that they document. Rules
by name give values for them; a field without a rule gets others by its type.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .families import FAMILIES, build, configuration
from .family_configs import LARGER, TEXT

MODES = ("none", "int8", "int4", "bf16")
SCALES: dict[str, tuple[float, ...]] = {
    "scale_norms": (3.0, 10.0, 30.0),
    "scale_weights": (0.1, 10.0, 30.0),
    "scale_biases": (15.0,),
}
_OWN = ("family", "seed", "modes", *SCALES)

ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "tanh"]
# Fields that change no computation of a model that exists, or that only a size may change.
_IGNORED = re.compile(
    r".*_token_id$|use_cache|initializer_range|.*aux_loss.*|pretraining_tp|output_router_logits|"
    r".*mtp.*|num_nextn.*|vocab_size.*|unpadded_vocab_size|seed|time_step_(min|max|floor)|"
    r"num_logits_to_keep|learnable_sink_init|rescale_prenorm_residual|use_mamba_kernels|use_mambapy|"
    r"use_associative_scan|moe_shared_expert_overlap|(hidden|d_model|intermediate|moe_hidden).*size|"
    r"num_(hidden_layers|attention_heads|experts|local_experts|heads)|n_routed_experts|d_model|"
    r"n_(heads|layers)|moe_num_experts|max_position_embeddings|max_seq_len|ffn_config|attn_config|"
    r"use_bidirectional_attention|enable_moe_block|.*_head_dim|head_dim|partial_rotary_factor|"
    r"make_ngram.*|ngram_vocab.*|split_ngram.*|mamba_(d_head|expand|head_dim|num_heads|n_heads)|"
    r"expand|shared_expert_sink|mamba_ssm_cache_dtype|moe_layer_end_index|classifier_dropout"
)
_RULES: list[tuple[str, list]] = [
    (r"(\w+_)?(hidden_act|hidden_activation|activation_function)", ACTIVATIONS),
    (r".*(eps|epsilon|norm_min)", [1e-6, 1e-3, 0.3]),
    (r".*(dropout|pdrop|jitter_noise)", [0.3]),
    (r"sliding_window(_size)?", [2, 5, 70]),
    (r"attention_chunk_size", [4, 32]),
    (r".*softcap(ping)?", [0.5, 3.0, 30.0]),
    (r"swiglu_limit", [0.1, 1.0, 7.0]),
    (r"clip_qkv", [0.3, 2.0, 8.0]),
    (r".*clip_threshold", [0.5, 4.0]),
    (r"scoring_func|expert_selection_fn", ["softmax", "sigmoid", "sqrtsoftplus"]),
    (r"topk_method", ["greedy", "group_limited_greedy", "noaux_tc"]),
    (r"shared_expert_combination_strategy", ["average", "sum"]),
    (r"output_gate_type", ["sigmoid", "silu"]),
    (r"position_embedding_type", ["rope", "nope", None]),
    (r"q_lora_rank", [None, 8, 24]),
    (r"kv_lora_rank|o_lora_rank|hc_lowrank|gated_norm_rank|loop_gate_rank", [8, 24]),
    (r"moe_latent_size", [None, 8, 24]),
    (r"(n|num|moe_num)_shared_experts", [0, 1, 2]),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts)", [1, 2, 4]),
    (r"(n_group|topk_group)", [1, 2]),
    (r"decoder_sparse_step|moe_layer_interval|interleave_moe_layer_step", [1, 2]),
    (r"mlp_only_layers", [[], [0], [1]]),
    (r"first_k_dense_replace|num_dense_layers|max_window_layers|num_kv_shared_layers", [0, 1]),
    (r"moe_layers", [[0], [0, 1], []]),
    (r"no_rope_layers", [[1, 1], [0, 1], [0, 0]]),
    (r"index_topk|indexer_budget", [2, 8, 200]),
    (r"layer_rope_theta", [[100.0, 100.0], [10000.0, 0.0], [0.0, 0.0]]),
    (r"time_step_limit", [[0.1, 1.0]]),
    (r"num_key_value_heads|swa_num_key_value_heads", [1, 2, 4]),
    (r"(index_block_size|index_topk_blocks|index_kpool|hc_mult|block_size|chunk_size)", [2, 4]),
    (r".*(conv_kernel|conv_L_cache|d_conv|kernel_dim|kernel_size)\w*", [2, 4]),
    (r"(mamba_)?n_groups", [1, 2, 4]),
    (r"(mamba_d_state|ssm_state_size|d_rel|rel_extent|floor_scale|log_scaling_n_floor)", [4, 32]),
]


@dataclasses.dataclass(frozen=True)
class Draw:
    """A model to check. Its text is one line, which `of` reads again."""

    family: str
    seed: int = 0
    modes: tuple[str, ...] = MODES
    scales: tuple[tuple[str, float], ...] = ()
    options: tuple[tuple[str, str], ...] = ()  # Values as JSON: draws can be compared.

    def __str__(self) -> str:
        own = [f"family={self.family}", f"seed={self.seed}", f"modes={','.join(self.modes)}"]
        return " ".join(own + [f"{k}={v}" for k, v in (*self.scales, *self.options)])

    @staticmethod
    def of(text: str) -> Draw:
        pairs = dict(item.split("=", 1) for item in text.split())
        scales = tuple((k, float(v)) for k, v in pairs.items() if k in SCALES)
        options = tuple((k, v) for k, v in pairs.items() if k not in _OWN)
        modes = tuple(pairs.get("modes", ",".join(MODES)).split(","))
        return Draw(pairs["family"], int(pairs.get("seed", 0)), modes, scales, options)

    def with_options(self, options: dict[str, Any]) -> Draw:
        texts = ((k, json.dumps(v, separators=(",", ":"))) for k, v in options.items())
        return dataclasses.replace(self, options=tuple(texts))

    @property
    def overrides(self) -> dict[str, Any]:
        return {k: json.loads(v) for k, v in self.options}

    def build(self) -> PreTrainedModel:
        """Returns the model; raises whatever transformers raises for these options."""
        model = build(self.family, self.seed, **nested(self.family, self.overrides))
        scale(model, dict(self.scales))
        return model


def nested(family: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options as DBRX wants them, whose configuration has two parts of its own."""
    if family != "dbrx":
        return options
    result = {k: v for k, v in options.items() if "." not in k}
    for part in ("attn_config", "ffn_config"):
        own = {k.split(".")[1]: v for k, v in options.items() if k.startswith(f"{part}.")}
        result[part] = {**TEXT["dbrx"][1][part], **own}
    return result


@torch.no_grad()
def scale(model: PreTrainedModel, scales: dict[str, float]) -> None:
    """Multiplies norm weights, other weights and biases of the layers. Embeddings and heads stay:
    they would only scale the numbers that are compared."""
    for name, p in model.named_parameters():
        if "embed" in name or "lm_head" in name:
            continue
        norm, vector = "norm" in name and p.dim() == 1, p.dim() == 1 or name.endswith("proj_bias")
        kind = "scale_norms" if norm else "scale_biases" if vector else "scale_weights"
        p.mul_(scales.get(kind, 1.0))


# ----------------------------------------------------------------------------------------- options


@functools.cache
def options_of(family: str) -> dict[str, list]:
    """Returns the options of a family and values for each of them other than that of its tiny
    configuration."""
    config = configuration(family)[1].get_text_config()
    fields = {f.name for f in dataclasses.fields(type(config))}
    plain = {f.name for f in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    table: dict[str, list] = {}
    for name in sorted(fields - plain):
        if _IGNORED.fullmatch(name) and name != "first_k_dense_replace":
            continue
        now = config.__dict__.get(config.attribute_map.get(name, name))
        values = _ropes(now) if name == "rope_parameters" else _values(name, now)
        values = [v for v in values if v != now]
        if values:
            table[name] = values
    if "head_dim" in fields and "partial_rotary_factor" not in str(config.__dict__):
        table["partial_rotary_factor"] = [0.5]
    if family == "dbrx":
        table |= {"attn_config.clip_qkv": [0.3, 2.0, None], "attn_config.kv_n_heads": [1, 4]}
        table |= {
            "ffn_config.moe_normalize_expert_weights": [None, 2.0],
            "ffn_config.moe_top_k": [1],
        }
        table["ffn_config.ffn_act_fn"] = [{"name": name} for name in ACTIVATIONS[1:]]
    return table


def _values(name: str, now: Any) -> list:
    for pattern, values in _RULES:
        if re.fullmatch(pattern, name):
            return values
    if isinstance(now, bool):
        return [not now]
    if isinstance(now, float):
        return [0.4 * now, 2.5 * now] if now else [0.3, -0.5]
    if isinstance(now, list) and len(now) > 1:  # Kinds of layers, in other orders.
        return [now[::-1], [now[0]] * len(now), [now[-1]] * len(now)]
    if isinstance(now, int) and name.endswith(("factor", "multiplier", "scale")):
        return [0.4 * now, 2.5 * now]
    return []


def _ropes(now: Any) -> list:
    """Returns kinds of rotary positions; longrope has as many factors as the tiny models angles."""
    if not isinstance(now, dict):
        return []
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
         "mscale": 0.7, "mscale_all_dim": 1.5, "beta_fast": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
         "attention_factor": 1.7},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
         "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
         "short_mscale": 1.1, "long_mscale": 1.3},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    ]  # fmt: skip
    parts = {k: v for k, v in now.items() if isinstance(v, dict)}
    if parts:
        return [{k: {**v, **kind} if k in parts else v for k, v in now.items()} for kind in kinds]
    kept = {k: v for k, v in now.items() if k in ("rope_theta", "mrope_section")}
    return [{**kept, **kind} for kind in kinds]


# ------------------------------------------------------------------------------------------- sizes


def random_sizes(family: str, rng: random.Random) -> dict[str, Any]:
    """Returns sizes of a family's text model. Some families refuse some of them."""
    base = TEXT[family][1] if family in TEXT else LARGER[family][1]
    result: dict[str, Any] = {}

    def put(names: str, value: Any) -> None:
        result.update({name: value for name in names.split() if name in base})

    hidden = rng.choice([16, 32, 48, 64, 96])
    heads = rng.choice([2, 4, 8])
    kv_heads = heads if "kv_lora_rank" in base else rng.choice([1, 2, heads])
    if family != "deepseek_v4":
        put("hidden_size d_model", hidden)
        put("num_attention_heads n_heads", heads)
        put("num_key_value_heads", kv_heads)
    if "mrope_section" not in str(base.get("rope_parameters")) and "kv_lora_rank" not in base:
        put("head_dim", base.get("head_dim", 8) * rng.choice([1, 1, 2]))
    put("qk_nope_head_dim", rng.choice([4, 8, 12]))
    put("v_head_dim", rng.choice([4, 8, 12]))
    put("kv_lora_rank", rng.choice([8, 16, 24, 32]))
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
                 "intermediate_size_mlp", "shared_intermediate_size"):  # fmt: skip
        if isinstance(base.get(name), int):
            result[name] = rng.choice([32, 64, 96, 4 * rng.randint(2, 24)])
    experts = rng.choice([2, 3, 4, 6, 8, 12])
    if "n_group" in base:
        groups = rng.choice([g for g in (1, 2, 4) if experts % g == 0 and experts >= 2 * g])
        kept = rng.randint(1, groups)
        put("n_group", groups)
        put("topk_group", kept)
        most = experts // groups * kept
    else:
        most = experts
    put("num_experts num_local_experts n_routed_experts moe_num_experts", experts)
    top_k = 1 if family == "zaya" else rng.randint(1, most)
    put("num_experts_per_tok moe_topk moe_k top_k_experts", top_k)
    put("vocab_size", rng.choice([64, 80, 129]))
    put("vocab_size_per_layer_input", result.get("vocab_size"))
    put("max_position_embeddings max_seq_len", rng.choice([64, 256]))
    if family == "dbrx":
        result |= {"attn_config.kv_n_heads": kv_heads, "ffn_config.moe_num_experts": experts,
                   "ffn_config.moe_top_k": top_k, "ffn_config.ffn_hidden_size": 32}  # fmt: skip
    return {**result, **_layers(family, base, rng)}


def _layers(family: str, base: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Returns one to four layers: lists with an entry per layer get that many, the first kept."""
    key = next((k for k in ("num_hidden_layers", "n_layers") if k in base), "")
    if not key or "kv_source_layers" in base or "loop_num_passes" in base:
        return {}
    count, before = rng.randint(1, 4), base[key]
    result: dict[str, Any] = {key: count}
    for name, value in base.items():
        per_layer = isinstance(value, list) and len(value) == before and "size" not in name
        if per_layer and name not in ("mlp_only_layers", "moe_layers", "ple_layer_ids"):
            drawn = [rng.choice(value) for _ in range(count)]
            if name == "num_attention_heads_per_layer":
                drawn = [rng.choice([2, 4]) for _ in range(count)]
            result[name] = [value[0], *drawn[1:]]
    return result


# ------------------------------------------------------------------------------------------- draws


def one_at_a_time(seed: int) -> list[Draw]:
    """Returns each family as it is, with each value of each option, and with each scale."""
    draws = []
    for family in FAMILIES:
        draws.append(Draw(family, seed))
        for name, values in options_of(family).items():
            draws += [Draw(family, seed).with_options({name: value}) for value in values]
        for name, factors in SCALES.items():
            draws += [Draw(family, seed, scales=((name, factor),)) for factor in factors]
    random.Random(seed).shuffle(draws)
    return draws


def random_draw(rng: random.Random, family: str = "") -> Draw:
    """Returns random sizes, up to two options and sometimes a scale of one family."""
    family = family or rng.choice(FAMILIES)
    table = options_of(family)
    options = random_sizes(family, rng) if rng.random() < 0.8 else {}
    for name in rng.sample(sorted(table), min(rng.choice([0, 1, 2, 2]), len(table))):
        options[name] = rng.choice(table[name])
    scales = ()
    if rng.random() < 0.4:
        name = rng.choice(sorted(SCALES))
        scales = ((name, rng.choice(SCALES[name])),)
    return Draw(family, rng.randrange(10**6), scales=scales).with_options(options)


def simpler(draw: Draw) -> Iterator[Draw]:
    """Yields draws with one thing less: a mode, a scale, an option."""
    if len(draw.modes) > 1:
        yield from (dataclasses.replace(draw, modes=(mode,)) for mode in draw.modes)
    for kept in _without_one(draw.scales):
        yield dataclasses.replace(draw, scales=kept)
    if len(draw.options) > 2:
        half = len(draw.options) // 2
        yield dataclasses.replace(draw, options=draw.options[:half])
        yield dataclasses.replace(draw, options=draw.options[half:])
    for kept in _without_one(draw.options):
        yield dataclasses.replace(draw, options=kept)
    if draw.seed:
        yield dataclasses.replace(draw, seed=0)


def _without_one(items: tuple) -> list[tuple]:
    return [items[:i] + items[i + 1 :] for i in range(len(items))]

"""Model sizes that determine memory and traffic: presets, and config.json files.

Letters: H hidden size, I intermediate size of an expert, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_ops import _files
from moe_ops._fields import Fields, check_types
from moe_ops._files import shown

_READER = "plan"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer with mixture-of-experts layers.

    Attributes:
        name: for tables.
        hidden_size, intermediate_size: H and I.
        num_experts, top_k: E and K.
        num_moe_layers, num_dense_layers: layers with experts, and layers with a network of width
            `dense_intermediate_size` instead.
        shared_intermediate_size: width of all shared experts together; 0 without.
        num_groups, num_topk_groups: number of expert groups, and of groups that a token may use.
        gated: experts have two input matrices and one output matrix (SwiGLU), else one and one.
        bias: experts have biases.
        num_heads, num_kv_heads, head_size: of attention.
        q_rank, kv_rank, rope_size, v_size: of MLA (DeepSeek-V2 and later), where `head_size` is
            that of queries and keys, including the rotary part; q_rank 0 is full-rank queries,
            kv_rank 0 plain attention.
        vocab_size, tied: size of the vocabulary, and whether the embedding is also the output's
            weight.
        float32_router: logits are computed in float32.

    Raises:
        ValueError: invalid sizes.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_moe_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    num_dense_layers: int = 0
    dense_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    num_groups: int = 1
    num_topk_groups: int = 1
    gated: bool = True
    bias: bool = False
    q_rank: int = 0
    kv_rank: int = 0
    rope_size: int = 0
    v_size: int = 0
    tied: bool = False
    float32_router: bool = False

    def __post_init__(self) -> None:
        check_types(self, _READER)
        needed = (
            "hidden_size",
            "intermediate_size",
            "num_experts",
            "top_k",
            "num_moe_layers",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "vocab_size",
            "num_groups",
            "num_topk_groups",
            *(("dense_intermediate_size",) if self.num_dense_layers else ()),
            *(("v_size",) if self.kv_rank else ()),
        )
        for name in needed:
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be at least 1, got {getattr(self, name)}.")
        if self.num_experts % self.num_groups or self.num_topk_groups > self.num_groups:
            raise ValueError(
                f"plan: num_groups must divide the {self.num_experts} experts and be at least "
                f"num_topk_groups, got {self.num_groups} and {self.num_topk_groups}."
            )
        if self.top_k > self.allowed_experts:
            raise ValueError(
                f"plan: top_k must be at most the {self.allowed_experts} experts that a token may "
                f"use, got {self.top_k}."
            )

    @property
    def num_layers(self) -> int:
        return self.num_moe_layers + self.num_dense_layers

    @property
    def allowed_experts(self) -> int:
        """Returns the number of experts in the groups that a token may use."""
        return self.num_experts // self.num_groups * self.num_topk_groups

    # ------------------------------------------------------------------------- numbers of weights

    @property
    def expert_weights(self) -> int:
        """Returns the number of weights of one expert."""
        biases = self.width + self.hidden_size if self.bias else 0
        return (self.width + self.intermediate_size) * self.hidden_size + biases

    @property
    def width(self) -> int:
        """Returns the features of an expert before its activation: 2I, or I without a gate."""
        return self.intermediate_size * (2 if self.gated else 1)

    def network(self, intermediate_size: int) -> list[Matrix]:
        """Returns the weights of a dense network of this width; [] for width 0."""
        if not intermediate_size:
            return []
        width = intermediate_size * (2 if self.gated else 1)
        return [Matrix(width, self.hidden_size), Matrix(self.hidden_size, intermediate_size)]

    def attention(self) -> list[Matrix]:
        """Returns the weights of attention and the two norms of a layer."""
        h, heads = self.hidden_size, self.num_heads
        norms = [Matrix(h, 1), Matrix(h, 1)]
        if not self.kv_rank:
            kv = 2 * self.num_kv_heads * self.head_size
            q_out = heads * self.head_size
            return [*norms, Matrix(q_out, h), Matrix(kv, h), Matrix(h, q_out)]
        q_out = heads * self.head_size
        queries = [Matrix(q_out, h)]
        if self.q_rank:
            queries = [Matrix(self.q_rank, h), Matrix(q_out, self.q_rank)]
        kv_out = heads * (self.head_size - self.rope_size + self.v_size)
        latent = [Matrix(self.kv_rank + self.rope_size, h), Matrix(kv_out, self.kv_rank)]
        return [*norms, *queries, *latent, Matrix(h, heads * self.v_size)]

    def dense_parts(self, experts: bool) -> list[Matrix]:
        """Returns all weights of a layer except those of its experts, for a layer with or without
        experts."""
        if not experts:
            return self.attention() + self.network(self.dense_intermediate_size)
        router = Matrix(self.num_experts, self.hidden_size)
        return [*self.attention(), router, *self.network(self.shared_intermediate_size)]

    @property
    def total_weights(self) -> int:
        """Returns the number of weights of the model."""
        ends = (1 if self.tied else 2) * self.vocab_size * self.hidden_size + self.hidden_size
        moe = self.num_experts * self.expert_weights + count(self.dense_parts(True))
        return (
            ends
            + self.num_moe_layers * moe
            + self.num_dense_layers * count(self.dense_parts(False))
        )

    @property
    def active_weights(self) -> int:
        """Returns the number of weights used per token."""
        idle = self.num_moe_layers * (self.num_experts - self.top_k) * self.expert_weights
        return self.total_weights - idle

    @property
    def cache_elements(self) -> int:
        """Returns the number of elements of keys and values per token, in all layers."""
        if self.kv_rank:
            return self.num_layers * (self.kv_rank + self.rope_size)
        return self.num_layers * 2 * self.num_kv_heads * self.head_size


class Matrix(NamedTuple):
    """A weight [rows, columns]; other dimensionalities are the first dimension and the product of
    the others."""

    rows: int
    columns: int

    def share(self, ranks: int) -> int:
        """Returns the elements that each rank allocates if the weight is sharded by rows."""
        return -(-self.rows // ranks) * self.columns


def count(weights: Iterable[Matrix]) -> int:
    """Returns the total number of elements."""
    return sum(m.rows * m.columns for m in weights)


_DEEPSEEK: dict[str, Any] = {
    "num_heads": 128,
    "num_kv_heads": 128,
    "head_size": 192,
    "q_rank": 1536,
    "kv_rank": 512,
    "rope_size": 64,
    "v_size": 128,
    "float32_router": True,
}
_MIXTRAL: dict[str, Any] = {"num_experts": 8, "top_k": 2, "num_kv_heads": 8, "head_size": 128}
_QWEN3: dict[str, Any] = {
    "num_experts": 128,
    "top_k": 8,
    "num_kv_heads": 4,
    "head_size": 128,
    "vocab_size": 151_936,
}
_GPT_OSS: dict[str, Any] = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "top_k": 4,
    "num_heads": 64,
    "num_kv_heads": 8,
    "head_size": 64,
    "vocab_size": 201_088,
    "bias": True,
}
# Sizes of the published config.json files.
PRESETS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_DEEPSEEK,
        "hidden_size": 7168,
        "intermediate_size": 2048,
        "num_experts": 256,
        "top_k": 8,
        "num_moe_layers": 58,
        "num_dense_layers": 3,
        "dense_intermediate_size": 18_432,
        "shared_intermediate_size": 2048,
        "num_groups": 8,
        "num_topk_groups": 4,
        "vocab_size": 129_280,
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "hidden_size": 5120,
        "intermediate_size": 1536,
        "num_experts": 160,
        "top_k": 6,
        "num_moe_layers": 59,
        "num_dense_layers": 1,
        "dense_intermediate_size": 12_288,
        "shared_intermediate_size": 3072,
        "num_groups": 8,
        "num_topk_groups": 3,
        "vocab_size": 102_400,
    },
    "kimi_k2": {
        **_DEEPSEEK,
        "num_heads": 64,
        "num_kv_heads": 64,
        "hidden_size": 7168,
        "intermediate_size": 2048,
        "num_experts": 384,
        "top_k": 8,
        "num_moe_layers": 60,
        "num_dense_layers": 1,
        "dense_intermediate_size": 18_432,
        "shared_intermediate_size": 2048,
        "vocab_size": 163_840,
    },
    "qwen3_235b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 1536,
        "num_moe_layers": 94,
        "num_heads": 64,
    },
    "qwen3_30b": {
        **_QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 768,
        "num_moe_layers": 48,
        "num_heads": 32,
    },
    "glm_4_5": {
        "hidden_size": 5120,
        "intermediate_size": 1536,
        "num_experts": 160,
        "top_k": 8,
        "num_moe_layers": 89,
        "num_dense_layers": 3,
        "dense_intermediate_size": 12_288,
        "shared_intermediate_size": 1536,
        "num_heads": 96,
        "num_kv_heads": 8,
        "head_size": 128,
        "vocab_size": 151_552,
        "float32_router": True,
    },
    "gpt_oss_120b": {**_GPT_OSS, "num_experts": 128, "num_moe_layers": 36},
    "gpt_oss_20b": {**_GPT_OSS, "num_experts": 32, "num_moe_layers": 24},
    "mixtral_8x7b": {
        **_MIXTRAL,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_moe_layers": 32,
        "num_heads": 32,
        "vocab_size": 32_000,
    },
    "mixtral_8x22b": {
        **_MIXTRAL,
        "hidden_size": 6144,
        "intermediate_size": 16_384,
        "num_moe_layers": 56,
        "num_heads": 48,
        "vocab_size": 32_768,
    },
    "olmoe": {
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_experts": 64,
        "top_k": 8,
        "num_moe_layers": 16,
        "num_heads": 16,
        "num_kv_heads": 16,
        "head_size": 128,
        "vocab_size": 50_304,
    },
}
_SHORT = {"mixtral": "mixtral_8x7b", "gpt_oss": "gpt_oss_120b", "qwen3": "qwen3_235b"}


def find_shape(model: str | Path) -> ModelShape:
    """Returns the shape of a preset, of a config.json, or of a folder with one.

    Raises:
        ValueError: neither a preset nor a file, or a file that does not describe a mixture of
            experts.
    """
    name = str(model).lower().replace("-", "_").replace(".", "_")
    name = _SHORT.get(name, name)
    if name in PRESETS:
        return ModelShape(name=name, **PRESETS[name])
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(
            f"plan: MODEL must be a config.json, a folder with one, or one of "
            f"{', '.join(PRESETS)}, got {str(model)!r}."
        )
    title = path.parent.name if path.name == "config.json" else path.stem
    try:
        return shape_of(_files.read_json(path), title or str(path))
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"plan: in {path}, {str(error).removeprefix('plan: ')}") from error


def shape_of(config: Mapping[str, Any], name: str | None = None) -> ModelShape:
    """Returns the shape that a config.json of transformers describes.

    Args:
        config: contents of the file. Names differ between models; supported are those of Mixtral,
            Qwen2-MoE and Qwen3-MoE, DeepSeek, GLM, gpt-oss, OLMoE, GraniteMoE, Phi-MoE, DBRX, Llama
            4.
        name: name for tables; None is the file's `model_type`.

    Raises:
        ValueError: a size is missing or invalid.
    """
    fields = Fields(config, _READER)
    for section in ("text_config", "llm_config"):
        fields = fields.section(section) if section in fields else fields
    ffn = fields.section("ffn_config") if "ffn_config" in fields else fields
    attn = fields.section("attn_config") if "attn_config" in fields else fields
    model_type = str(fields.values.get("model_type", "model"))
    hidden = fields.size("hidden_size", "d_model")
    heads = fields.size("num_attention_heads", "n_heads")
    width = ffn.size(
        "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size"
    )
    experts = ffn.size(
        "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"
    )  # In this order: some files also contain an alias.
    layers = fields.size("num_hidden_layers", "n_layers", "num_layers")
    dense = _dense_layers(fields, layers)
    if dense >= layers:
        raise ValueError(f"plan: config.json must have layers with experts, got {layers} without.")
    latent = "kv_lora_rank" in fields
    rope = fields.size("qk_rope_head_dim", default=0, least=0) if latent else 0
    head = fields.size("head_dim", default=hidden // heads)
    if heads > hidden and "head_dim" not in fields and not latent:
        raise ValueError(f"plan: num_attention_heads must be at most {hidden}, got {heads}.")
    if latent:
        head = fields.size("qk_nope_head_dim") + rope
    return ModelShape(
        name=model_type if name is None else name,
        hidden_size=hidden,
        intermediate_size=width,
        num_experts=experts,
        top_k=ffn.size(
            "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k"
        ),
        num_moe_layers=layers - dense,
        num_dense_layers=dense,
        dense_intermediate_size=fields.size("intermediate_size_mlp", "intermediate_size", default=0)
        if dense
        else 0,
        shared_intermediate_size=_shared_width(fields, model_type, width),
        num_groups=fields.size("n_group", default=1),
        num_topk_groups=fields.size("topk_group", default=1) if "n_group" in fields else 1,
        bias=model_type == "gpt_oss",
        num_heads=heads,
        num_kv_heads=attn.size("num_key_value_heads", "kv_n_heads", default=heads),
        head_size=head,
        q_rank=fields.size("q_lora_rank", default=0, least=0) if latent else 0,
        kv_rank=fields.size("kv_lora_rank") if latent else 0,
        rope_size=rope,
        v_size=fields.size("v_head_dim") if latent else 0,
        vocab_size=fields.size("vocab_size"),
        tied=fields.flag("tie_word_embeddings", default=False),
        float32_router=model_type in ("deepseek_v2", "deepseek_v3", "glm4_moe"),
    )


def _dense_layers(fields: Fields, layers: int) -> int:
    """Returns the number of layers without experts."""
    if "moe_layers" in fields:  # Llama 4: layers with experts
        return layers - len(_numbers(fields, "moe_layers", layers))
    step = fields.size("decoder_sparse_step", "interleave_moe_layer_step", default=1)
    named = _numbers(fields, "mlp_only_layers", layers)
    first = fields.size("first_k_dense_replace", default=0, least=0)
    # Of the numbers 1 to `layers`, those divisible by `step`, except the first ones.
    sparse = layers // step - min(first, layers) // step
    return layers - sparse + sum((i + 1) % step == 0 and i >= first for i in named)


def _numbers(fields: Fields, name: str, layers: int) -> set[int]:
    """Returns the numbers below `layers` in a list of a config.json, none if it is missing.

    Raises:
        ValueError: it is not a list of integers.
    """
    value = fields.values.get(name)
    value = [] if value is None else value
    whole = isinstance(value, list) and all(type(number) is int for number in value)
    if not whole:
        raise ValueError(f"{_READER}: {name} must be numbers of layers, got {shown(value)}.")
    return {number for number in value if 0 <= number < layers}


def _shared_width(fields: Fields, model_type: str, width: int) -> int:
    """Returns the width of all shared experts of a layer together."""
    if model_type.startswith("llama4"):
        return width
    size: int = fields.size(
        "shared_expert_intermediate_size", "shared_intermediate_size", default=0, least=0
    )
    return size or width * fields.size("n_shared_experts", "num_shared_experts", default=0, least=0)

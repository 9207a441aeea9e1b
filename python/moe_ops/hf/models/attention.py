"""Attention of transformers' decoder layers that `attention_decode` and `mla_decode` compute.

B batch, S tokens, d head size, r rank of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_ops.hf.models.known import Unknown, add_table, register, unexpected_parts
from moe_ops.hf.models.norms import epsilon_of

# Functions of attention implementations that compute plain softmax attention. Others, such as
# user-registered ones, may compute something else.
PLAIN_FUNCTIONS: set[Callable[..., Any]] = {sdpa_attention_forward}


def option_of(module: Any, name: str, default: Any = None) -> Any:
    """Returns an entry of a module's configuration. Attribute lookup of configurations is Python
    code, which takes longer than the rest of a step's checks."""
    config = module.__dict__.get("config")
    if config is None:
        return default
    return object.__getattribute__(config, "__dict__").get(name, default)


def implementation_of(attention: Any) -> str | None:
    """Returns "eager" or "sdpa", which determine the module's masks and scores; None for an unknown
    implementation."""
    name = option_of(attention, "_attn_implementation_internal")
    if name is None or name == "eager":
        return "eager"
    try:
        function = ALL_ATTENTION_FUNCTIONS[name]
    except KeyError:
        return None
    return "sdpa" if function in PLAIN_FUNCTIONS else None


@dataclass(frozen=True)
class HeadAttention:
    """Grouped heads with rotary positions: o_proj(softmax(q k^T * scaling) v).

    q, k and v are q_proj(x), k_proj(x) and v_proj(x); attributes `head_dim` and `scaling` are read
    at each call.

    norms: True if q and k pass through q_norm and k_norm, or the name of the flag.
    sinks: True if a parameter `sinks` contains a score per head for attending to nothing.
    one_angle: True if cos and sin contain each angle once; otherwise twice.
    partial: True if angles for fewer features than a head has rotate only those features.
    only_if: returns False for a module whose current settings change the formula.
    """

    norms: bool | str = False
    sinks: bool = False
    one_angle: bool = False
    partial: bool = False
    only_if: Callable[[Any], bool] | None = None

    def why_not(self, attention: nn.Module) -> str | None:
        """Returns why this module does not compute the formula; None if it does."""
        projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
        normed = self.has_norms(attention)
        norms = {"q_norm", "k_norm"} if normed else set()
        reason = unexpected_parts(attention, projections | norms, set())
        if reason is not None:
            return reason
        if reason := _not_linear(attention, projections):
            return reason
        parameters = {name for name, p in attention._parameters.items() if p is not None}
        if parameters != ({"sinks"} if self.sinks else set()) or attention._buffers:
            return "it has parameters that the formula does not read"
        if reason := _norms_differ(attention, sorted(norms)):
            return reason
        return self.why_not_now(attention)

    def why_not_now(self, attention: Any) -> str | None:
        """Returns the setting that does not match the formula; None if all match."""
        state = attention.__dict__
        size = state.get("head_dim")
        if type(size) is not int or size % 4:
            return "head_dim must be a multiple of 4"
        if type(state.get("scaling")) is not float or type(state.get("layer_idx")) is not int:
            return "scaling must be a number and layer_idx an index"
        if state.get("is_causal", True) is not True:
            return "it is not causal"
        if self.only_if is not None and not self.only_if(attention):
            return "an option of its configuration changes the formula"
        if implementation_of(attention) is None:
            return "its attention implementation is not one of transformers' own"
        return None

    def has_norms(self, attention: Any) -> bool:
        """Returns whether q_norm and k_norm are used."""
        if isinstance(self.norms, str):
            return bool(attention.__dict__.get(self.norms))
        return self.norms


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (MLA), whose cache stores the inputs of kv_b_proj.

    Submodules are q_proj, or q_a_proj, q_a_layernorm and q_b_proj if `q_lora_rank` is set, and
    kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj and o_proj.

    interleaved: see mla_decode; None reads `config.rope_interleave`.
    interleaved_keys: see mla_decode.
    complex_angles: True if positions are complex numbers instead of cos and sin.
    """

    interleaved: bool | None = None
    interleaved_keys: bool = False
    complex_angles: bool = False

    def why_not(self, attention: nn.Module) -> str | None:
        """Returns why this module does not compute the formula; None if it does."""
        query = {"q_a_proj", "q_b_proj"} if self.has_bottleneck(attention) else {"q_proj"}
        projections = {*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
        norms = {"kv_a_layernorm"} | (
            {"q_a_layernorm"} if self.has_bottleneck(attention) else set()
        )
        reason = unexpected_parts(attention, projections | norms, set())
        if reason is not None:
            return reason
        if reason := _not_linear(attention, projections):
            return reason
        if any(p is not None for p in attention._parameters.values()) or attention._buffers:
            return "it has parameters that the formula does not read"
        kv_b: Any = attention._modules["kv_b_proj"]
        if kv_b.bias is not None:
            return "kv_b_proj must have no bias"
        if reason := _norms_differ(attention, sorted(norms)):
            return reason
        return self.why_not_now(attention)

    def why_not_now(self, attention: Any) -> str | None:
        """Returns the setting that does not match the formula; None if all match."""
        state = attention.__dict__
        names = ("num_heads", "kv_lora_rank", "qk_rope_head_dim", "layer_idx")
        if any(type(state.get(name)) is not int for name in names):
            return f"{', '.join(names)} must be integers"
        if type(state.get("scaling")) is not float:
            return "scaling must be a number"
        if state.get("is_causal", True) is not True:
            return "it is not causal"
        if type(self.is_interleaved(attention)) is not bool:
            return "config.rope_interleave must be True or False"
        if implementation_of(attention) is None:
            return "its attention implementation is not one of transformers' own"
        return None

    def has_bottleneck(self, attention: Any) -> bool:
        """Returns whether queries pass through q_a_proj."""
        return attention.__dict__.get("q_lora_rank") is not None

    def is_interleaved(self, attention: Any) -> Any:
        """Returns the module's current value of `interleaved`."""
        if self.interleaved is not None:
            return self.interleaved
        return option_of(attention, "rope_interleave")

    def angles(self, positions: Any, rope_size: int) -> tuple[Tensor, Tensor] | None:
        """Returns cos and sin from the positions that a model passes to its layers."""
        if self.complex_angles:
            if not isinstance(positions, Tensor) or not positions.is_complex():
                return None
            return positions.real, positions.imag
        if not isinstance(positions, tuple) or positions[0].shape[-1] != rope_size:
            return None
        return positions

    def operands(self, attention: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arguments of mla_decode.

        Args:
            attention: the module, whose settings are read.
            parts: by name of projections weight, scale, bias and format; of norms the weight.
        """
        state = attention.__dict__
        found: dict[str, Any] = {
            "w_kv_b": parts["kv_b_proj"][0],
            "kv_norm": parts["kv_a_layernorm"],
            "num_heads": state["num_heads"],
            "scale": state["scaling"],
            "interleaved": self.is_interleaved(attention),
            "interleaved_keys": self.interleaved_keys,
        }
        names = {"q": "q_proj", "kv_a": "kv_a_proj_with_mqa", "o": "o_proj"}
        if self.has_bottleneck(attention):
            names |= {"q": "q_b_proj", "q_a": "q_a_proj"}
            found["q_norm"] = parts["q_a_layernorm"]
        for name, part in names.items():
            found[f"w_{name}"], found[f"w_{name}_scale"], found[f"b_{name}"], _ = parts[part]
        found["formats"] = [parts[part].format for part in names.values()]
        return found


def _not_linear(attention: nn.Module, names: set[str]) -> str | None:
    for name in sorted(names):
        if not isinstance(attention._modules[name], nn.Linear):
            return f"{name} must be a linear layer"
    return None


def _norms_differ(attention: Any, names: list[str]) -> str | None:
    """Returns why these are not RMS norms with one epsilon; None if they are."""
    epsilons = set()
    for name in names:
        norm = attention._modules[name]
        try:
            epsilons.add(epsilon_of(norm))
        except Unknown as error:
            return f"{name}: {error}"
    return "its norms have several epsilons" if len(epsilons) > 1 else None


def _unclipped(attention: Any) -> bool:
    return option_of(attention, "clip_qkv", ...) is None


def _rotates_exaone(attention: Any) -> bool:
    state = attention.__dict__
    return state.get("sliding_window", ...) is None or state.get("is_sliding") is True


def _rotates_flint(attention: Any) -> bool:
    return attention.__dict__.get("sliding_window") is not None


_PLAIN = HeadAttention()
_NORMED = HeadAttention(norms=True)
_DEEPSEEK_V3 = LatentAttention()
add_table(
    "attention",
    {
        # Qwen2-MoE, Granite, Aria, Solar, DeepSeek-OCR 2 (transformers 5.7 to 5.23; from 5.24 on)
        "41a780a27a68": _PLAIN,
        "3198e2e765aa": _PLAIN,
        # Mixtral
        "927257faf8a4": _PLAIN,
        "13e66e2441ce": _PLAIN,
        # Qwen3-MoE, Qwen3-Omni, Dots, Mellum
        "c1f7bae7fb5d": _NORMED,
        "da681bcd5023": _NORMED,
        # Qwen3-VL
        "9c6fbacae101": _NORMED,
        "6e5758c9fd13": _NORMED,
        # Hunyuan 3
        "797a1221012f": _NORMED,
        "b95b1dcf5bf5": _NORMED,
        # Lara; its calls without positions do not rotate
        "8e694ff21e4e": _NORMED,
        # OLMoE, where queries, keys and values are not clipped
        "2125194c699f": HeadAttention(norms=True, only_if=_unclipped),
        "ddef98cd92c3": HeadAttention(norms=True, only_if=_unclipped),
        # MiniMax-M2
        "7436e276b39a": HeadAttention(norms=True, partial=True),
        "c43ae1c47074": HeadAttention(norms=True, partial=True),
        # GLM-4
        "5bddf7741271": HeadAttention(norms="use_qk_norm", partial=True),
        "12da25f25c33": HeadAttention(norms="use_qk_norm", partial=True),
        # GLM-4V
        "f87ca920fb3e": HeadAttention(partial=True),
        "d4bece4066dd": HeadAttention(partial=True),
        # EXAONE, whose global layers have no positions where others have a window
        "c3304e732e14": HeadAttention(norms=True, only_if=_rotates_exaone),
        "357942c8eb08": HeadAttention(norms=True, only_if=_rotates_exaone),
        # Flint, whose layers without a window have no positions
        "676b32dd5d8b": HeadAttention(norms=True, sinks=True, only_if=_rotates_flint),
        "a2b40674bebe": HeadAttention(norms=True, sinks=True, only_if=_rotates_flint),
        # gpt-oss (5.7 to 5.15; 5.16 to 5.23; from 5.24 on)
        "4971c8ff29b9": HeadAttention(sinks=True, one_angle=True),
        "ec75a420e6d2": HeadAttention(sinks=True, one_angle=True),
        "5becc94993af": HeadAttention(sinks=True, one_angle=True),
        # DeepSeek-V3 and GLM-4 Lite. Before 5.16 their caches kept the keys of all heads.
        "ad2b9196012c": _DEEPSEEK_V3,
        "eb69a73dfdee": _DEEPSEEK_V3,
        # A.X K1, the last two with queries that are always latent
        "bf1686aefc99": _DEEPSEEK_V3,
        "e9fb0bd5dc8b": _DEEPSEEK_V3,
        # DeepSeek-V2
        "f16ad268e0f7": LatentAttention(True, interleaved_keys=True, complex_angles=True),
        "32861721e1f1": LatentAttention(True, interleaved_keys=True, complex_angles=True),
    },
)


def register_attention(
    cls: type[nn.Module], *, norms: bool | str = False, partial: bool = False
) -> None:
    """Registers a class as attention of grouped heads with rotary positions, like Mixtral's.

    :func:`moe_ops.hf.optimize` then runs it for few tokens in one call, if it agrees with the
    formula on a few inputs.

    Args:
        cls: a class of modules with q_proj, k_proj, v_proj and o_proj, and attributes `head_dim`,
            `scaling`, `layer_idx` and `config`, with the interface of transformers' attention.
        norms: True if queries and keys pass through q_norm and k_norm before rotation, or the name
            of the flag attribute.
        partial: True if positions with fewer angles rotate only the first features of a head.

    Raises:
        TypeError: `cls` is not a class of modules.
    """
    register("attention", cls, HeadAttention(norms=norms, partial=partial))

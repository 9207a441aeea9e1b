"""Routers of transformers that `router_linear` and `topk_router` compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_ops.hf.models.known import add_table, register


@dataclass(frozen=True)
class TopkRouter:
    """Router with logits x @ weight.T that selects the `top_k` experts with the largest scores.

    A field with the name of an attribute states where the module stores a setting, which is read at
    each call.

    score: "softmax" or "sigmoid".
    renormalize: True if weights are divided by their sum, or the name of the flag.
    scale: the attribute with the factor of the weights; None for 1.
    selection_bias: the attribute with a value per expert that is added to scores for selection
    only.
    groups: score of a group of experts, "max" or "top2_sum"; the sizes are `num_group` and
    `topk_group`. None without groups.
    only_if: an attribute and its value if the formula applies.
    grouped_if: an attribute and its value if groups are used.
    bias: True if logits have a `bias`.
    wide: True if GEMMs run in float32 whatever the dtypes of x and weight.
    wide_logits, wide_weights: True if results are float32 even if x is not.
    """

    score: str = "softmax"
    renormalize: bool | str = False
    scale: str | None = None
    selection_bias: str | None = None
    groups: str | None = None
    only_if: tuple[str, Any] | None = None
    grouped_if: tuple[str, Any] | None = None
    bias: bool = False
    wide: bool = False
    wide_logits: bool = False
    wide_weights: bool = False

    def why_not(self, router: nn.Module) -> str | None:
        """Returns why this module does not compute the formula; None if it does."""
        parameters = {name for name, p in router._parameters.items() if p is not None}
        if parameters != ({"weight", "bias"} if self.bias else {"weight"}) or router._modules:
            return "its parameters must be weight" + (" and bias" if self.bias else "")
        if self.arguments(router) is None:
            return "its settings are not those of the formula"
        return None

    def arguments(self, router: Any) -> dict[str, Any] | None:
        """Returns the arguments of topk_router for the module's current settings; None if its
        formula differs."""
        state = router.__dict__
        top_k = state.get("top_k")
        if type(top_k) is not int or not 1 <= top_k <= router.weight.shape[0]:
            return None
        if not _holds(state, self.only_if):
            return None
        arguments: dict[str, Any] = {"top_k": top_k, "score_func": self.score}
        renormalize = self.renormalize
        if type(renormalize) is str:
            renormalize = state.get(renormalize)
        if type(renormalize) is not bool:
            return None
        arguments["renormalize"] = renormalize
        if self.scale is not None:
            scale = state.get(self.scale)
            if type(scale) not in (float, int) or not math.isfinite(scale):
                return None
            arguments["routed_scaling_factor"] = float(scale)
        if self.groups is not None and _holds(state, self.grouped_if):
            sizes = state.get("num_group"), state.get("topk_group")
            if not _are_groups(*sizes, router.weight.shape[0], top_k, self.groups):
                return None
            arguments["num_groups"], arguments["num_topk_groups"] = sizes
            arguments["group_score"] = self.groups
        if self.selection_bias is not None:
            bias = router._buffers.get(self.selection_bias)
            if not isinstance(bias, Tensor):
                return None
            arguments["expert_bias"] = bias
        return arguments


def _are_groups(num_groups: Any, kept: Any, num_experts: int, top_k: int, judged: str) -> bool:
    """Returns whether the op supports these groups. If the selected groups have fewer than top_k
    experts, transformers also selects others."""
    if type(num_groups) is not int or type(kept) is not int or not 1 <= kept <= num_groups:
        return False
    size, rest = divmod(num_experts, num_groups)
    return not rest and top_k <= kept * size and (judged == "max" or size >= 2)


def _holds(state: dict[str, Any], condition: tuple[str, Any] | None) -> bool:
    return condition is None or state.get(condition[0], ...) == condition[1]


_WIDE: dict[str, Any] = {"wide": True, "wide_logits": True, "wide_weights": True}
_DEEPSEEK_V3 = TopkRouter(
    "sigmoid",
    renormalize="norm_topk_prob",
    scale="routed_scaling_factor",
    selection_bias="e_score_correction_bias",
    groups="top2_sum",
    **_WIDE,
)
_QWEN = TopkRouter(renormalize="norm_topk_prob")
_GRANITE = TopkRouter(renormalize=True, wide_logits=True)
_SOFTMAX_OF_CHOSEN = TopkRouter(renormalize=True)
add_table(
    "router",
    {
        # DeepSeek-V3, GLM-4, Dots, EXAONE, Nemotron-H, Kimi, ...
        "cf432fff5fe4": _DEEPSEEK_V3,
        # Beam, whose block applies the factor afterwards.
        "d92948c1771d": TopkRouter(
            "sigmoid",
            renormalize="norm_topk_prob",
            selection_bias="e_score_correction_bias",
            groups="top2_sum",
            **_WIDE,
        ),
        # A.X K2 fills unselected groups with 0, which exceeds scores with a negative bias: the
        # formula applies only without groups.
        "d5a8d90a37f9": TopkRouter(
            "sigmoid",
            renormalize="norm_topk_prob",
            scale="routed_scaling_factor",
            selection_bias="e_score_correction_bias",
            only_if=("num_group", None),
            **_WIDE,
        ),
        # DeepSeek-V2, DeepSeek-OCR 2
        "1d580a22288d": TopkRouter(
            scale="routed_scaling_factor",
            groups="max",
            grouped_if=("topk_method", "group_limited_greedy"),
            **_WIDE,
        ),
        # OLMoE, FlexOlmo, Qwen2-MoE, Qwen3-MoE, Qwen3-Next, Mellum
        "2349424559a6": _QWEN,
        # Qwen3.5-MoE, Qwen3-VL-MoE
        "158c90ec76fe": _SOFTMAX_OF_CHOSEN,
        # Lara: logits in float32
        "2ea543587c22": TopkRouter(renormalize="norm_topk_prob", wide=True, wide_logits=True),
        # Mixtral, MiniMax
        "53991b8794a1": TopkRouter(renormalize=True, wide_weights=True),
        # Granite, in all its forms
        "f903e5d3e34f": _GRANITE,
        # gpt-oss
        "bd0e0eade139": TopkRouter(renormalize=True, bias=True),
        # Command A, if it is set to softmax
        "e6f1222737d6": TopkRouter(renormalize=True, only_if=("expert_selection_fn", "softmax")),
        # Aria
        "f4a62267e201": _SOFTMAX_OF_CHOSEN,
        # Jamba
        "02d0172136c0": TopkRouter(),
    },
)


def register_router(
    cls: type[nn.Module],
    *,
    score: str = "softmax",
    renormalize: bool | str = False,
    scale: str | None = None,
    selection_bias: str | None = None,
    groups: str | None = None,
    bias: bool = False,
) -> None:
    """Registers a class as a top-k router that returns logits, weights and ids, in this order.

    :func:`moe_ops.hf.optimize` then fuses modules of exactly this class, if they agree with the
    formula on a few inputs. Logits are x @ weight.T in the dtype of x, which is also that of the
    weights.

    Args:
        cls: a class of modules with a parameter `weight` [E, H] and an attribute `top_k`.
        score: "softmax" or "sigmoid".
        renormalize: True if weights are divided by their sum, or the name of the flag attribute.
        scale: the name of the attribute with the factor of the weights.
        selection_bias: the name of the buffer [E] that is added to scores for selection only.
        groups: "max" or "top2_sum" for experts in `num_group` groups, of which `topk_group` are
            selected.
        bias: True if logits have a `bias` [E].

    Raises:
        TypeError: `cls` is not a class of modules.
    """
    entry = TopkRouter(
        score,
        renormalize=renormalize,
        scale=scale,
        selection_bias=selection_bias,
        groups=groups,
        bias=bias,
    )
    register("router", cls, entry)

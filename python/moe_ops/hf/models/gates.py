"""Activations between the two GEMMs of an expert or of a dense network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import activations as hf_activations

from moe_ops.hf.models.source import read

# By exact class: a subclass may compute something else. The four tanh variants differ by rounding.
_ACTIVATION_OF_CLASS: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"}
for _class_name, _activation in (
    ("SiLUActivation", "silu"),
    ("GELUActivation", "gelu"),
    ("GELUTanh", "gelu_tanh"),
    ("NewGELUActivation", "gelu_tanh"),
    ("FastGELUActivation", "gelu_tanh"),
    ("AccurateGELUActivation", "gelu_tanh"),
    ("ReLUSquaredActivation", "relu2"),
):
    if hasattr(hf_activations, _class_name):
        _ACTIVATION_OF_CLASS[getattr(hf_activations, _class_name)] = _activation

# A forward that was replaced, at any time, is not that of the class.
_CLASSES: tuple[Any, ...] = (*_ACTIVATION_OF_CLASS, nn.GELU)
_FORWARDS: dict[type, Any] = {
    cls: cls.forward
    for cls in _CLASSES
    if cls.forward.__module__ == cls.__module__ and not hasattr(cls.forward, "__wrapped__")
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


def activation_name(act_fn: Any) -> str | None:
    """Returns the name of an activation in moe_ffn; None for an unknown one.

    A module with forward hooks or a patched forward counts as unknown: a fused op would never run
    them.
    """
    if not isinstance(act_fn, nn.Module):
        return None
    state = act_fn.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
        return None
    cls = type(act_fn)
    if _FORWARDS.get(cls) is not cls.forward:
        return None
    if cls is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_OF_CLASS[cls]


def fused_gate(act_fn: Any) -> dict[str, Any] | None:
    """Returns the arguments of moe_ffn for ``act_fn(gate) * up``; None if it has none."""
    name = activation_name(act_fn)
    return {"activation": _GATED[name]} if name in _GATED else None


@dataclass(frozen=True)
class ClampedGate:
    """Activation of a gated FFN with gate at most `limit` and up between -limit and limit.

    alpha: name of the experts' attribute for (up + 1) * gate * sigmoid(alpha * gate), or None for
        silu(gate) * up.
    limit: name of the experts' attribute.
    interleaved: True if gate and up alternate; otherwise the gate half comes first.
    has_act_fn: True if silu is the experts' `act_fn`, which may be another activation.
    """

    alpha: str | None
    limit: str
    interleaved: bool = False
    has_act_fn: bool = False


@dataclass(frozen=True)
class PlainGate:
    """Activation act_fn(gate) * up of halves, if the experts' attribute `limit` is None."""

    limit: str


# Digest of `_apply_gate` -> the gate, or None for act_fn(gate) * up on halves.
_GATES: dict[str, ClampedGate | PlainGate | None] = {
    "c2ed68475700": None,
    # gpt-oss
    "12f3205ad306": ClampedGate("alpha", "limit", interleaved=True),
    # OpenAI's privacy filter
    "57ba2beb63a2": ClampedGate("alpha", "limit"),
    # MiniMax-M3
    "008f63846b03": ClampedGate("swiglu_alpha", "swiglu_limit"),
    # DeepSeek-V4
    "058bc636ec12": ClampedGate(None, "limit", has_act_fn=True),
    # GLM-5-Next
    "1b23ea1561fe": ClampedGate(None, "swiglu_limit"),
    # Step-3.7, and Bailing from transformers 5.25 on: bounds after act_fn, in a few layers
    "a59dcb639427": PlainGate("limit"),
}
_UNKNOWN = object()
_known: dict[Callable[..., Any], Any] = {}


@torch.compiler.assume_constant_result
def _gate_of(cls: type) -> Any:
    function = cls._apply_gate  # type: ignore[attr-defined]
    if function not in _known:
        code = read(cls, "_apply_gate")
        _known[function] = _UNKNOWN if code is None else _GATES.get(code.digest, _UNKNOWN)
    return _known[function]


def fused_activation(experts: Any) -> dict[str, Any] | None:
    """Returns the arguments of moe_ffn for the activation of experts on transformers' interface;
    None if the experts' own `_apply_gate` or `act_fn` must be called."""
    if not getattr(experts, "has_gate", True):
        name = activation_name(experts.act_fn)
        return None if name is None else {"activation": name}
    if "_apply_gate" in experts.__dict__:  # Replaced on this module.
        return None
    gate = _gate_of(type(experts))
    if isinstance(gate, PlainGate):
        gate = None if getattr(experts, gate.limit) is None else _UNKNOWN
    if gate is None:
        return fused_gate(experts.act_fn)
    if gate is _UNKNOWN:
        return None
    limit = float(getattr(experts, gate.limit))
    if gate.alpha is None:
        if gate.has_act_fn and activation_name(experts.act_fn) != "silu":
            return None
        return {"activation": "swiglu_clamped", "interleaved": gate.interleaved, "limit": limit}
    return {
        "activation": "swiglu_oai",
        "interleaved": gate.interleaved,
        "alpha": float(getattr(experts, gate.alpha)),
        "limit": limit,
    }

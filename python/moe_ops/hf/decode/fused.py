"""Norms, routers and dense networks of transformers' models on the ops of moe_ops.

A module gets a fused class, a subclass of its own class with another forward, and keeps its
parameters, buffers and hooks. :mod:`moe_ops.hf.models` defines the formulas of classes; settings
are read from the module at each call. A call that does not match the entry uses the module's own
forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _verify as verify
from moe_ops.hf.models.known import Unknown, code_of, entry_of
from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops import add_rms_norm, gated_act, router_linear, topk_router

try:  # Output collection by transformers' own hooks; without it, all hooks count.
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None  # type: ignore[assignment]

_TENSORS = (Tensor, nn.Parameter)
_classes: dict[tuple[str, type], type] = {}
# Kind -> functions that make methods of a fused class, by name.
_methods: dict[str, dict[str, Callable[[Any], Any]]] = {}


def register_kind(
    kind: str, make_forward: Callable[[Any], Callable[..., Any]], **others: Callable[[Any], Any]
) -> None:
    """Registers a kind of fused classes with a function that makes the forward for a class, and
    functions that make other attributes of the class."""
    _methods[kind] = {"forward": make_forward, **others}


def set_fused(module: nn.Module, kind: str, settings: Any) -> None:
    """Gives a module the fused class of a kind."""
    module.__class__ = _fused_class(kind, type(module))
    module._moe_ops_fused = settings


def unset_fused(module: nn.Module) -> None:
    """Gives a module with a fused class the class that it had before."""
    module.__class__ = type(module)._moe_ops_own  # type: ignore[attr-defined]
    del module._moe_ops_fused


def kind_of(module: nn.Module) -> str | None:
    """Returns the kind of a module's fused class; None for another class, including one that was
    derived from a fused class (for example by parametrizations)."""
    return type(module).__dict__.get("_moe_ops_kind")


def is_intact(module: nn.Module) -> bool:
    """Returns False if the code under a fused class has been replaced."""
    code: Any = type(module)._moe_ops_code  # type: ignore[attr-defined]
    return code is None or code.is_intact()


def is_silent(module: nn.Module) -> bool:
    """Returns whether this module has no active hooks and no patched forward."""
    state = module.__dict__
    if "forward" in state or state["_forward_pre_hooks"]:
        return False
    hooks = state["_forward_hooks"]
    if not hooks:
        return True
    # transformers leaves its hooks installed after, for example, a call with output_router_logits.
    if _active_collector is None or not all(
        getattr(hook, "__name__", "") == "output_capturing_hook" for hook in hooks.values()
    ):
        return False
    collected = _active_collector.get() or ()
    return "router_logits" not in collected and "attentions" not in collected


def _fused_class(kind: str, cls: type) -> type:
    if (kind, cls) not in _classes:
        _classes[kind, cls] = type(
            cls.__name__,
            (cls,),
            {
                **{name: make(cls) for name, make in _methods[kind].items()},
                "__reduce_ex__": _reduce,
                "__module__": cls.__module__,
                "_moe_ops_kind": kind,
                "_moe_ops_code": code_of(cls),
                "_moe_ops_own": cls,
            },
        )
    return _classes[kind, cls]


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Supports pickling and copying a class that cannot be imported by name: it is recreated."""
    cls = type(self)
    return _new, (cls._moe_ops_kind, cls.__mro__[1]), self.__dict__


def _new(kind: str, cls: Any) -> Any:
    """Returns an empty module of the fused class, or of its own class if the installed transformers
    has other code for it."""
    if kind in ("norm", "router", "network", "layer"):
        try:
            entry_of(kind, cls)
        except Unknown:
            return cls.__new__(cls)
    fused: Any = _fused_class(kind, cls)
    return fused.__new__(fused)


# ------------------------------------------------------------------------------------------- norms


def norm_operands(
    norm: Any, dtype: torch.dtype, intact: Collection[type] = ()
) -> tuple[Tensor, float] | None:
    """Returns weight and epsilon of a fused norm that an op may read instead of calling it; None if
    it must be called.

    Args:
        norm: any module.
        dtype: of the tokens.
        intact: fused classes whose code was just verified.
    """
    cls = type(norm)
    if cls.__dict__.get("_moe_ops_kind") != "norm" or not is_silent(norm):
        return None
    if cls not in intact and not is_intact(norm):
        return None
    weight = norm._parameters.get("weight")
    eps = norm.__dict__["_moe_ops_fused"].epsilon(norm)
    if eps is None or type(weight) not in _TENSORS or weight.dtype != dtype:
        return None
    return weight, eps


def _norm_forward(cls: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        eps = self._moe_ops_fused.epsilon(self)
        if (
            args
            or kwargs
            or eps is None
            or hidden_states.dtype != self.weight.dtype
            or not is_intact(self)
            or verify.takes_own_forward()
        ):
            return cls.forward(self, hidden_states, *args, **kwargs)
        y = add_rms_norm(hidden_states, self.weight, eps=eps)[0]
        if verify.is_due(self):
            verify.compare(self, "norm", y, lambda: cls.forward(self, hidden_states))
        return y

    return forward


# ----------------------------------------------------------------------------------------- routers


def _router_forward(cls: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = None
        if not (args or kwargs or verify.takes_own_forward()):
            chosen = route(self, hidden_states)
        if chosen is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        return chosen

    return forward


def route(
    router: Any, x: Tensor, *, exact: bool = False, intact: Collection[type] = ()
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns logits, weights and ids of a fused router for tokens [..., H]; None if its own
    forward must be called.

    Args:
        router: a module of a fused class.
        x: tokens.
        exact: keep weights in fp32, the dtype in which experts use them, even if the router rounds
            them.
        intact: fused classes whose code was just verified.
    """
    entry = router.__dict__["_moe_ops_fused"]
    weight, bias = router.weight, router.bias if entry.bias else None
    if x.dtype != weight.dtype and not entry.wide:
        return None
    if type(router) not in intact and not is_intact(router):
        return None
    arguments = entry.arguments(router)
    if arguments is None:
        return None
    dtype, rows = x.dtype, x.reshape(-1, x.shape[-1])
    if entry.wide:
        logits = router_linear(rows.float(), weight.float(), None if bias is None else bias.float())
    else:
        logits = router_linear(rows, weight, bias)
    weights, ids = topk_router(logits, **arguments)
    if verify.is_due(router):
        own: Any = type(router)._moe_ops_own
        verify.compare_choice(router, (logits, weights, ids), lambda: own.forward(router, x))
    return (
        logits.float() if entry.wide_logits else logits,
        weights if entry.wide_weights or exact else weights.to(dtype),
        ids,
    )


# ---------------------------------------------------------------------------------- dense networks


def _network_forward(cls: Any) -> Callable[..., Any]:
    """Returns a forward that differs from the network's own in the batch-invariant mode only:
    torch's activations treat the last elements of a tensor differently."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        activation = None
        if is_batch_invariant_enabled() and not (args or kwargs) and is_intact(self):
            activation = self._moe_ops_fused.activation(self)
        if activation is None or verify.takes_own_forward():
            return cls.forward(self, x, *args, **kwargs)
        gate_up = torch.cat([self.gate_proj(x), self.up_proj(x)], -1)
        return self.down_proj(gated_act(gate_up, activation))

    return forward


register_kind("norm", _norm_forward)
register_kind("router", _router_forward)
register_kind("network", _network_forward)

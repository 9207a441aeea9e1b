"""Norms and routers of transformers' models on the ops of moe_ops.

A class is judged by what it computes on a few numbers, once for each module that is asked about:
its name would not show a changed formula. A module of a fused class has the parameters, buffers
and hooks that it had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._private_torch import disable_modes
from moe_ops.ops import add_rms_norm, router_linear, topk_router

_TOLERANCE = 1e-5
_classes: dict[type, type] = {}


def fuse(module: nn.Module) -> str | None:
    """Gives a norm or a router its fused class, in place; what it is, or None for what is neither.

    Modules with a forward of their own (set by accelerate or kernels) are left alone.
    """
    if "forward" in module.__dict__:
        return None
    for kind, settings_of in _SETTINGS.items():
        settings = settings_of(module)
        if settings is not None:
            set_fused(module, kind, settings)
            return kind
    return None


def set_fused(module: nn.Module, kind: str, settings: Any) -> None:
    """Gives a module the fused class of a kind."""
    module.__class__ = _fused_class(kind, type(module))
    module._moe_ops_fused = settings


def register_kind(kind: str, make_forward: Callable[[Any], Callable[..., Any]]) -> None:
    """A kind of fused classes: what makes their forward of a class."""
    _FORWARDS[kind] = make_forward


def _fused_class(kind: str, cls: type) -> type:
    if cls not in _classes:
        forward = _FORWARDS[kind](cls)
        attributes = {"forward": forward, "__reduce_ex__": _reduce, "__module__": cls.__module__}
        _classes[cls] = type(cls.__name__, (cls,), {**attributes, "_moe_ops_kind": kind})
    return _classes[cls]


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """A class made here cannot be found by its name: pickles and copies make it again."""
    cls = type(self)
    return _new, (cls._moe_ops_kind, cls.__mro__[1]), self.__dict__


def _new(kind: str, cls: type) -> Any:
    fused: Any = _fused_class(kind, cls)
    return fused.__new__(fused)


# ------------------------------------------------------------------------------------------- norms


def _norm_forward(cls: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return cls.forward(self, hidden_states)
        return add_rms_norm(hidden_states, self.weight, eps=self._moe_ops_fused)[0]

    return forward


def norm_eps(module: nn.Module) -> float | None:
    """The epsilon of what is an RMSNorm; None for everything else."""
    weight = _only_vector(module)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or not isinstance(eps, float) or isinstance(module, nn.LayerNorm):
        return None
    probe = _probe(module)
    # Rows in which epsilon counts and rows in which it does not.
    x = torch.sin(torch.arange(4 * weight.numel(), dtype=torch.float32)).view(4, -1)
    x = x * torch.tensor([[1.0], [1e-3], [30.0], [3e-4]])
    actual = call_quietly(probe, x)
    expected = add_rms_norm(x, probe.weight.detach(), eps=eps)[0]
    return eps if isinstance(actual, Tensor) and close(actual, expected) else None


def _only_vector(module: nn.Module) -> Tensor | None:
    """The parameter `weight` [H] of a module that has nothing else."""
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    if weight is None or weight.dim() != 1 or parameters or any(True for _ in module.children()):
        return None
    return weight


# ----------------------------------------------------------------------------------------- routers


def _router_forward(cls: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = None if args or kwargs else route(self, hidden_states)
        if chosen is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        return chosen

    return forward


def route(router: Any, x: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits, weights and ids of a fused router for tokens [..., H]; None where the types of x and
    of the weight are not the same and the router does not make them so.

    exact: weights stay in fp32, which experts compute with, where the router rounds them.
    """
    choice, wide, logits_wide, weights_wide = router._moe_ops_fused
    weight, bias = router.weight, getattr(router, "bias", None)
    if x.dtype != weight.dtype and not wide:
        return None
    dtype = x.dtype
    x = x.reshape(-1, x.shape[-1])
    if wide:
        x, weight = x.float(), weight.float()
    logits = router_linear(x, weight, bias)
    if choice.get("expert_bias"):
        choice = {**choice, "expert_bias": router.e_score_correction_bias}
    weights, ids = topk_router(logits, **choice)
    return (
        logits.float() if logits_wide else logits,
        weights if weights_wide or exact else weights.to(dtype),
        ids,
    )


def router_settings(module: nn.Module) -> tuple[Mapping[str, Any], bool, bool, bool] | None:
    """The arguments of topk_router, and whether products, logits and weights are in fp32 where
    tokens are not; None for what chooses otherwise, or is no router."""
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    if weight is None or weight.dim() != 2 or not hasattr(module, "top_k"):
        return None
    if parameters.keys() - {"bias"} or isinstance(module, nn.Linear):
        return None
    probe = _probe(module)
    generator = torch.Generator().manual_seed(0)
    # Logits of size one at any width: in a softmax of large ones the first weight is all but 1,
    # and weights that are renormalised look like those that are not.
    x = torch.randn(32, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
    actual = call_quietly(probe, x)
    if not (isinstance(actual, tuple) and len(actual) == 3):
        return None
    logits = router_linear(x, probe.weight.detach(), getattr(probe, "bias", None))
    for choice in _choices(module):
        given = dict(choice)
        if given.get("expert_bias"):
            given["expert_bias"] = probe.e_score_correction_bias
        try:
            weights, ids = topk_router(logits, **given)
        except ValueError:
            continue
        if _same_choice((logits, weights, ids), actual):
            break
    else:
        return None
    half = call_quietly(probe.to(torch.bfloat16), x.bfloat16())
    if half is None:
        return None
    half_logits, half_weights, _ = half
    wide = half_logits.dtype == torch.float32
    # Products of bfloat16 that became float32 afterwards have no more digits than before.
    products = wide and not torch.equal(half_logits.bfloat16().float(), half_logits)
    return choice, products, wide, half_weights.dtype == torch.float32


def _choices(module: Any) -> list[dict[str, Any]]:
    base = {"top_k": module.top_k}
    scaled = {**base, "routed_scaling_factor": float(getattr(module, "routed_scaling_factor", 1.0))}
    groups: dict[str, Any] = {}
    if getattr(module, "num_group", None):
        groups = {"num_groups": module.num_group, "num_topk_groups": module.topk_group}
    choices: list[dict[str, Any]] = []
    for renormalize in (False, True):
        choices.append({**scaled, "renormalize": renormalize})
        if groups:
            choices.append({**scaled, **groups, "renormalize": renormalize})
        if hasattr(module, "e_score_correction_bias"):
            sigmoid = {"score_func": "sigmoid", "expert_bias": True, "group_score": "top2_sum"}
            choices.append({**scaled, **groups, **sigmoid, "renormalize": renormalize})
    return choices


def _same_choice(ours: tuple[Tensor, ...], theirs: tuple[Any, ...]) -> bool:
    """Whether logits are the same, and weights by expert, in whatever order they come."""
    logits, weights, ids = ours
    other_logits, other_weights, other_ids = theirs
    if other_weights.shape != weights.shape or not close(other_logits, logits):
        return False
    mine = torch.zeros_like(logits).scatter(1, ids.long(), weights)
    other = torch.zeros_like(logits).scatter(1, other_ids.long(), other_weights.float())
    return close(other, mine)


# ------------------------------------------------------------------------------------------ probes


def _probe(module: nn.Module) -> Any:
    """The module in fp32 on the CPU with numbers of its own, of the same sizes."""
    probe = copy.copy(module)
    generator = torch.Generator().manual_seed(1)
    for kind in ("_parameters", "_buffers"):
        made = {}
        for name, t in getattr(module, kind).items():
            if t is not None:
                values = 1.0 + 0.5 * torch.randn(t.shape, generator=generator)
                t = nn.Parameter(values, requires_grad=False) if kind == "_parameters" else values
            made[name] = t
        probe.__dict__[kind] = made
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        probe.__dict__[hooks] = {}
    return probe


def call_quietly(probe: Any, *args: Any, **kwargs: Any) -> Any:
    """What it returns; None where it wants other arguments, so that it is nothing known here."""
    # from_pretrained builds models with "meta" as the default device: what the function makes of
    # its own must not go there either.
    with disable_modes(), torch.device("cpu"), torch.no_grad():
        try:
            return probe(*args, **kwargs)
        except Exception:
            return None


def close(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    error = (actual.double() - expected.double()).norm()
    return bool(error <= _TOLERANCE * expected.double().norm())


# Kind -> what makes the forward of a fused class, and what tells modules and their settings.
_FORWARDS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "norm": _norm_forward,
    "router": _router_forward,
}
_SETTINGS: dict[str, Callable[[nn.Module], Any]] = {"norm": norm_eps, "router": router_settings}

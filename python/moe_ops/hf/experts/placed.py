"""Experts that stay in CPU memory, whatever device the model around them is moved to.

A placed module gets a subclass of its own class, like a fused one. Its calls copy their tensors to
the CPU and their result back (:mod:`moe_ops._seam`), or copy the weights to the GPU
(:mod:`moe_ops.hf.experts.streamed`), or use experts that are there already
(:mod:`moe_ops.hf.experts.cached`); its tensors ignore moves to other devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._seam import run_on_cpu
from moe_ops.hf.decode.fused import kind_of, register_kind, set_fused, unset_fused
from moe_ops.hf.experts.cached import cache_of, run_cached, serves
from moe_ops.hf.experts.streamed import run_streamed, weights_changed

_KIND = "placed"
_AHEAD = "ahead"
_SHARED = "_moe_ops_shared"
_RESULT = "_moe_ops_ahead"


def is_placed(module: nn.Module, *, itself: bool = False) -> bool:
    """Returns whether the module's tensors stay on the CPU.

    Args:
        itself: False for a module whose class was derived from that of a placed one.
    """
    return kind_of(module) == _KIND if itself else getattr(type(module), "_moe_ops_placed", False)


def set_placed(module: nn.Module) -> None:
    """Moves a module to the CPU, where it stays."""
    if not is_placed(module):
        module.cpu()
        set_fused(module, _KIND, None)


def unset_placed(module: nn.Module) -> None:
    """Gives a placed module its own class back; its tensors stay where they are."""
    shared: nn.Module
    for shared in module.__dict__.pop(_SHARED, ()):
        shared.__dict__.pop(_RESULT, None)
        if kind_of(shared) == _AHEAD:
            unset_fused(shared)
    unset_fused(module)


def run_ahead(experts: nn.Module, shared: nn.Module) -> None:
    """Runs shared experts on the tokens of each call of placed experts, while that call is on the
    CPU. The next call of `shared` then returns what was computed."""
    if kind_of(shared) != _AHEAD:
        set_fused(shared, _AHEAD, None)
    experts.__dict__[_SHARED] = (shared,)  # Not as a submodule.


def run_placed(
    experts: nn.Module,
    run: Callable[..., Tensor],
    *args: Any,
    call: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Returns ``run(*args, **kwargs)``, computed on the CPU like a call of placed experts.

    Args:
        call: called like `run_on_cpu`, and in its place.
    """
    call = run_on_cpu if call is None else call
    (shared,) = experts.__dict__.get(_SHARED, (None,))
    if shared is None:
        return call(run, *args, **kwargs)
    if shared.__dict__.pop(_RESULT, None) is not None:
        # The last result was not used: something computes this network in another way.
        del experts.__dict__[_SHARED]
        return call(run, *args, **kwargs)
    x = (*args, *kwargs.values())[0]

    def meanwhile() -> None:
        shared.__dict__[_RESULT] = x, x._version, shared(x)

    try:
        return call(run, *args, meanwhile=meanwhile, **kwargs)
    except BaseException:
        shared.__dict__.pop(_RESULT, None)
        raise


def without_moves(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns the function of an `nn.Module._apply` without its change of device."""

    def held(t: Tensor) -> Tensor:
        # Only an empty tensor goes to the other device.
        probe = fn(t.new_empty(0))
        return t.to(probe.dtype) if probe.device != t.device else fn(t)

    return held


def _forward(cls: Any) -> Callable[..., Tensor]:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        # A class derived from this one (by parametrizations) may compute its weights.
        if kind_of(self) == _KIND:
            y = run_streamed(self, cls, *args, **kwargs)
            if y is not None:
                return y
        run = functools.partial(cls.forward, self)
        if kind_of(self) == _KIND and serves(self, (*args, *kwargs.values())[0]):
            call = functools.partial(run_cached, run_on_cpu, self, cls)
            return run_placed(self, run, *args, call=call, **kwargs)
        return run_placed(self, run, *args, **kwargs)

    return forward


def _ahead_forward(cls: Any) -> Callable[..., Tensor]:
    @functools.wraps(cls.forward)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            before, version, y = self.__dict__.pop(_RESULT, (None, None, None))
            if before is not None and _same_tokens(x, before) and x._version == version:
                result: Tensor = y.view(x.shape)
                return result
        result = cls.forward(self, x, *args, **kwargs)
        return result

    return forward


def _same_tokens(x: Tensor, y: Tensor) -> bool:
    """Returns whether two tensors are views of one memory with equal rows."""
    return (
        x.data_ptr() == y.data_ptr()
        and x.dtype == y.dtype
        and x.shape[-1] == y.shape[-1]
        and x.numel() == y.numel()
        and x.is_contiguous()
        and y.is_contiguous()
    )


def _apply(cls: Any) -> Callable[..., Any]:
    def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        found = cls._apply(self, without_moves(fn), recurse)
        weights_changed(self)
        if (cache := cache_of(self)) is not None:
            cache.release()
        return found

    return apply


register_kind(_AHEAD, _ahead_forward)
register_kind(
    _KIND,
    _forward,
    _apply=_apply,
    _moe_ops_placed=lambda cls: True,
    expert_cache=lambda cls: property(cache_of),
)

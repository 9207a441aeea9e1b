"""Registry of module types with expert weights; each type registers one hook."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from .view import ExpertInputs, ExpertWeights


class ExpertsHook:
    """Knows a kind of module that holds float expert weights."""

    def weights(self, module: nn.Module) -> ExpertWeights | None:
        """Returns the weights of `module`, or None for another type of module.

        Raises ValueError, with the reason, for a module of this type whose experts moe_ffn cannot
        run.
        """
        raise NotImplementedError

    def reads_packed(self, module: nn.Module) -> bool:
        """Returns whether a call of `module` passes its weights to `packing.expert_ffn`."""
        raise NotImplementedError

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertInputs:
        """Returns the experts' inputs in a call of `module` with these arguments."""
        raise NotImplementedError

    def quantized_class(self, module: nn.Module) -> Any:
        """Returns the class of the quantized experts that take the place of `module`'s, where they
        are called in a way of their own; None: as `Experts` are."""
        return None

    def install(self, root: nn.Module, module: nn.Module, experts: Any) -> nn.Module:
        """Replaces the weights of `module` by `experts`; returns the root, which may be new."""
        return replace_module(root, module, experts)

    def check_root(self, root: nn.Module) -> None:
        """Raises ValueError for a model that must not be quantized, before any change."""

    def mark_quantized(
        self,
        root: nn.Module,
        format: str,
        x_scale: bool,
        skip: Sequence[str],
    ) -> None:
        """Marks a model as quantized with these options."""

    def mark_dense(self, root: nn.Module) -> None:
        """Marks a model whose dense layers have been quantized."""


_hooks: list[ExpertsHook] = []
# Top-level package of a module's class -> package that registers the hook of its modules.
_INTEGRATIONS = {"transformers": "moe_ops.hf"}


def register_hook(hook: ExpertsHook) -> None:
    _hooks.append(hook)


def hooks() -> Sequence[ExpertsHook]:
    """Returns the hooks in order of precedence: the first one that supports a module is used."""
    return _hooks


def hooks_for(root: nn.Module) -> Sequence[ExpertsHook]:
    """Returns the hooks, after importing the integrations that the modules of `root` need.

    Raises:
        ImportError: an integration does not support the version of its package.
    """
    classes = {cls for module in root.modules() for cls in type(module).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    for package in packages & _INTEGRATIONS.keys():
        importlib.import_module(_INTEGRATIONS[package])
    return _hooks


def is_quantized(module: Any) -> bool:
    """Returns whether this is a layer of quantized experts."""
    return getattr(module, "quantized_bank", False)


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replaces all occurrences of `old` in `root` by `new` (layers may share experts), and returns
    the root."""
    if root is old:
        return new
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return root

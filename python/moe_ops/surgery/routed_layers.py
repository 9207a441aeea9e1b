"""Routed layers of a model of any origin."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from moe_ops.layers import Router

from .routed_layer import RoutedLayer


def find_routed_layers(
    model: nn.Module, layers: Sequence[str] | None = None, *, caller: str = "find_routed_layers"
) -> list[RoutedLayer]:
    """Returns the routed layers of `model`, in the order of `named_modules`.

    Supported are layers of `moe_ops.layers` and of the zoo (`MoE`, `AttentionExperts` and others
    with a `Router`), and the MoE blocks of transformers that `moe_ops.hf` supports, switched to
    moe_ops or not, without JetMoE's attention experts.

    Args:
        layers: shell patterns of names; None is all.
        caller: name of the caller, for errors.

    Raises:
        ValueError: no routed layer, or a pattern without a match.
    """
    found = [*_ours(model)]
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    if any(cls.__module__.partition(".")[0] == "transformers" for cls in classes):
        # It needs transformers, which most processes do not import.
        found += importlib.import_module("moe_ops.surgery.hf_layers").hf_routed_layers(model)
    if not found:
        raise ValueError(
            f"{caller}: model must hold a routed layer of moe_ops or of transformers, got "
            f"{type(model).__name__}."
        )
    if layers is None:
        return found
    for pattern in layers:
        if not any(fnmatchcase(layer.name, pattern) for layer in found):
            names = ", ".join(layer.name for layer in found[:4])
            raise ValueError(
                f"{caller}: layers must match names of routed layers ({names}"
                f"{', ...' if len(found) > 4 else ''}), got {pattern!r}."
            )
    return [f for f in found if any(fnmatchcase(f.name, pattern) for pattern in layers)]


def _ours(model: nn.Module) -> Iterator[RoutedLayer]:
    for name, block in model.named_modules():
        if isinstance(block, nn.ModuleList):  # Its owner has these routers.
            continue
        routers: list[tuple[str, nn.Module]] = []
        for child_name, child in block.named_children():
            if isinstance(child, Router):
                routers.append((child_name, child))
            elif isinstance(child, nn.ModuleList) and child:
                inner = [(f"{child_name}.{i}", m) for i, m in enumerate(child)]
                routers += [pair for pair in inner if isinstance(pair[1], Router)]
        if routers:
            prefix = f"{name}." if name else ""
            named = [(prefix + child_name, router) for child_name, router in routers]
            yield RoutedLayer(name, block, named, getattr(block, "experts", None))

"""The layers of a model that route tokens to experts, whoever wrote the model.

Letters: T tokens, H hidden size, E experts, K experts a token.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from moe_ops.layers import Experts, Router, Routing
from moe_ops.layers.routing import RoutingOverride

# What is told of each call of a router: its input x [T, H] and what it made of it.
Watcher = Callable[[Tensor, Routing], None]


class RoutedLayer:
    """A module that holds a router, or several, and the experts behind it.

    Attributes:
        name: of the module, as in `named_modules`.
        block: the module.
        routers: (name, module) of its routers; several where experts are used several times
            (Chain-of-Experts).
        experts: the module that runs the experts, or None where the block does so by itself
            (attention experts).
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        routers: Sequence[tuple[str, nn.Module]],
        experts: nn.Module | None,
    ) -> None:
        self.name = name
        self.block = block
        self.routers = tuple(routers)
        self.experts = experts

    def rules(self, index: int = 0) -> Router:
        """How router number `index` chooses and weighs: the router, or one that does the same.

        Raises:
            ValueError: nobody knows.
        """
        router: Any = self.routers[index][1]
        return router

    @property
    def num_experts(self) -> int:
        router: Any = self.routers[0][1]
        return router.num_experts

    @property
    def top_k(self) -> int:
        router: Any = self.routers[0][1]
        return router.top_k

    def watch(self, watcher: Watcher) -> list[Any]:
        """Calls `watcher` after each call of a router from now on; handles whose `remove` ends
        it."""

        def hook(router: nn.Module, args: tuple[Any, ...], kwargs: Any, routing: Routing) -> None:
            (x,) = args
            watcher(x, routing)

        return [router.register_forward_hook(hook, with_kwargs=True) for _, router in self.routers]

    @contextlib.contextmanager
    def overridden(self, override: RoutingOverride) -> Iterator[None]:
        """All routers of the layer choose as `override` says while the context is open."""
        before = [(router, router.override) for _, router in self.routers]  # type: ignore[union-attr]
        try:
            for router, _ in before:
                router.override = override  # type: ignore[assignment]
            yield
        finally:
            for router, old in before:
                router.override = old

    def edit(
        self, experts: Callable[[Experts], Experts], router: Callable[[Router], Router]
    ) -> None:
        """Replaces the experts and the routers by what the functions make of them.

        Raises:
            ValueError: no bank of float experts of ours.
        """
        if not isinstance(self.experts, Experts):
            raise ValueError(
                f"{self.name or 'the layer'} must have experts of the class Experts to be changed, "
                f"got {type(self.experts if self.experts is not None else self.block).__name__}."
            )
        block: Any = self.block
        new_experts = experts(self.experts)
        changed = []
        for path, old in self.routers:
            own = path.removeprefix(f"{self.name}.") if self.name else path
            parent, _, child = own.rpartition(".")
            new: Any = router(old)  # type: ignore[arg-type]
            setattr(block.get_submodule(parent), child, new)
            changed.append((path, new))
        block.experts = self.experts = new_experts
        self.routers = tuple(changed)

    def __repr__(self) -> str:
        return f"RoutedLayer({self.name!r}, {self.num_experts} experts, top {self.top_k})"


def routed_layers(
    model: nn.Module, layers: Sequence[str] | None = None, *, caller: str = "routed_layers"
) -> list[RoutedLayer]:
    """The routed layers of `model`, in the order of `named_modules`.

    Known are layers of `moe_ops.layers` and of the zoo (`MoE`, `AttentionExperts` and others that
    hold a `Router`), and the MoE blocks of transformers that `moe_ops.hf` serves, switched to
    moe_ops or not, without JetMoE's attention experts.

    Args:
        layers: shell patterns of names; None is all.
        caller: for errors.

    Raises:
        ValueError: there is none, or a pattern that matches none.
    """
    found = [*_ours(model)]
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    if any(cls.__module__.partition(".")[0] == "transformers" for cls in classes):
        # It needs transformers, which most processes have no use for.
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
        if isinstance(block, nn.ModuleList):  # Its owner holds these routers.
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

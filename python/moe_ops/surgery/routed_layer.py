"""A layer of a model that routes tokens to experts, seen alike whoever wrote the model.

Letters: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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

"""Layer of a model that routes tokens to experts, with one interface for all kinds of models.

Letters: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from moe_ops.layers import Experts, Router, Routing
from moe_ops.layers.routing import RoutingOverride

# Called for each call of a router, with its input x [T, H] and its routing.
Watcher = Callable[[Tensor, Routing], None]


class RoutedLayer:
    """Module with one or several routers and their experts.

    Attributes:
        name: name of the module, as in `named_modules`.
        block: the module.
        routers: (name, module) of its routers; several if experts are used several times
            (Chain-of-Experts).
        experts: the module that runs the experts, or None if the block does (attention experts).
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
        """Returns the router number `index`, or an equivalent `Router`.

        Raises:
            ValueError: the router's method is unknown.
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
        """Calls `watcher` after each later call of a router; returns handles whose `remove` ends
        it."""

        def hook(router: nn.Module, args: tuple[Any, ...], kwargs: Any, routing: Routing) -> None:
            (x,) = args
            watcher(x, routing)

        return [router.register_forward_hook(hook, with_kwargs=True) for _, router in self.routers]

    @contextlib.contextmanager
    def overridden(self, override: RoutingOverride) -> Iterator[None]:
        """Applies `override` to all routers of the layer while the context is open."""
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
        """Replaces the experts and the routers by the results of the functions.

        Raises:
            ValueError: experts are not a float `Experts`.
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

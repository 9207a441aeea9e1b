"""The routed layers of transformers' models. Imported for such models only.

T tokens, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from moe_ops.hf.fused import router_settings
from moe_ops.layers import Router, Routing
from moe_ops.layers.routing import RoutingOverride

from .routed_layers import RoutedLayer, Watcher

# What blocks call their router.
_ROUTERS = ("gate", "router")


class HFRoutedLayer(RoutedLayer):
    """A block whose router returns (router_logits, topk_weights, topk_ids) for its experts."""

    _rules: Router | None = None

    def rules(self, index: int = 0) -> Router:
        if self._rules is None:
            self._rules = _stand_in(self.name, self.routers[0][1])
        bias = getattr(self.routers[0][1], "e_score_correction_bias", None)
        if bias is not None:  # It may have been trained, moved or loaded meanwhile.
            self._rules.expert_bias = bias
        return self._rules

    @property
    def num_experts(self) -> int:
        router: Any = self.routers[0][1]
        return router.weight.shape[0]

    def watch(self, watcher: Watcher) -> list[Any]:
        def hook(router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            logits, weights, ids = output
            watcher(args[0].reshape(-1, args[0].shape[-1]), Routing(logits, weights, ids))

        return [self.routers[0][1].register_forward_hook(hook)]

    @contextlib.contextmanager
    def overridden(self, override: RoutingOverride) -> Iterator[None]:
        self.rules()  # An unknown router is refused before anything runs.

        def hook(router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            logits, weights, _ = output
            routing = _route(self.rules(), override, logits)
            return (
                logits,
                routing.topk_weights.to(weights.dtype),
                routing.topk_ids.long(),
                *output[3:],
            )

        handle = self.routers[0][1].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def hf_routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Blocks of transformers with a router of its experts interface and experts beside it."""
    found: list[RoutedLayer] = []
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or isinstance(block, nn.ModuleList):
            continue
        for child_name in _ROUTERS:
            router = getattr(block, child_name, None)
            if isinstance(router, nn.Module) and _is_router(router):
                path = f"{name}.{child_name}" if name else child_name
                found.append(HFRoutedLayer(name, block, [(path, router)], experts))
    return found


def _is_router(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__module__.startswith("transformers.")
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and hasattr(module, "top_k")
        and not type(module).__name__.startswith("Llama4")  # It returns scores of all experts.
    )


def _stand_in(name: str, router: Any) -> Router:
    """A router of ours, without weights, that chooses and weighs by logits as this one does."""
    num_experts, hidden_size = router.weight.shape
    sizes = hidden_size, num_experts, router.top_k
    if type(router).__name__ == "PhimoeTopKRouter":
        eps = router.router_jitter_noise
        made = Router.like("phimoe", *sizes, sparsemixer_eps=eps, device="meta")
        return made.train(router.training)
    settings = router_settings(router)
    if settings is None:
        raise ValueError(
            f"route_as: {name} must have a router whose way of weighing is known, got "
            f"{type(router).__name__}."
        )
    choice = {n: value for n, value in settings[0].items() if n != "top_k"}
    return Router(*sizes, **choice, device="meta").eval()


def _route(rules: Router, override: RoutingOverride, router_logits: Tensor) -> Routing:
    rules.override = override
    try:
        ids = rules.choose(router_logits)
        return Routing(router_logits, rules.weights_at(router_logits, ids), ids)
    finally:
        rules.override = None

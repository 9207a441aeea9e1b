"""The routed layers of transformers' models. Imported for such models only.

T tokens, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from moe_ops.expert_weights.packing import invalidate
from moe_ops.hf.experts import bank_bias, bank_views, fused_activation
from moe_ops.hf.fused import router_settings
from moe_ops.hf.switch import interface_of
from moe_ops.layers import Experts, Router, Routing
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

    def edit(
        self, experts: Callable[[Experts], Experts], router: Callable[[Router], Router]
    ) -> None:
        if self.experts is None or interface_of(self.experts) is None:
            raise ValueError(
                f"{self.name} must have float experts of transformers to be changed, got "
                f"{type(self.experts).__name__}."
            )
        bank, theirs = _as_bank(self.name, self.experts), self.routers[0][1]
        as_ours = self.rules()
        rows = ("weight", "bias")
        for name in rows:
            setattr(as_ours, name, getattr(theirs, name, None))
        new_router, new_bank = router(as_ours), experts(bank)
        _write_bank(self.experts, new_bank)
        for name in rows:
            if getattr(theirs, name, None) is not None:
                setattr(theirs, name, getattr(new_router, name))
        if new_router.expert_bias is not None:
            _put(theirs, "e_score_correction_bias", new_router.expert_bias)
        sizes = {
            "num_experts": new_bank.num_experts,
            "out_features": new_bank.num_experts,
            "top_k": new_router.top_k,
            "num_group": new_router.num_groups,
            "topk_group": new_router.num_topk_groups,
        }
        for module in (self.experts, theirs, self.block):
            for name, value in sizes.items():
                if name in vars(module):
                    setattr(module, name, value)
        invalidate(self.experts)
        self._rules = None


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
    bias = getattr(router, "bias", None) is not None
    return Router(*sizes, **choice, bias=bias, device="meta").eval()


def _as_bank(name: str, experts: Any) -> Experts:
    """A bank of ours on the same weights."""
    activation = fused_activation(experts)
    if activation is None or getattr(experts, "has_post_expert_norm", False):
        raise ValueError(
            f"{name} must have an activation that moe_ffn knows, got that of "
            f"{type(experts).__name__}."
        )
    w_gate_up, w_down = bank_views(experts)
    b_gate_up, b_down = bank_bias(experts)
    num_experts, hidden_size, intermediate_size = w_down.shape
    bank = Experts(
        num_experts,
        hidden_size,
        intermediate_size,
        bias=b_down is not None,
        device="meta",
        **activation,
    )
    pairs = ("w_gate_up", w_gate_up), ("w_down", w_down), ("b_gate_up", b_gate_up)
    for own, tensor in (*pairs, ("b_down", b_down)):
        if tensor is not None:
            trained = tensor.requires_grad
            setattr(bank, own, nn.Parameter(tensor.detach(), requires_grad=trained))
    return bank


def _write_bank(experts: Any, bank: Experts) -> None:
    up = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    swapped = experts.is_transposed
    for name, own in ((up, bank.w_gate_up), ("down_proj", bank.w_down)):
        _put(experts, name, own.transpose(1, 2) if swapped else own)
    if experts.has_bias:
        _put(experts, f"{up}_bias", bank.b_gate_up)
        _put(experts, "down_proj_bias", bank.b_down)


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Replaces a parameter or buffer, whose shape may change."""
    old: Any = getattr(module, name)
    new = value.detach().to(old).contiguous()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, name, new)


def _route(rules: Router, override: RoutingOverride, router_logits: Tensor) -> Routing:
    rules.override = override
    try:
        ids = rules.choose(router_logits)
        return Routing(router_logits, rules.weights_at(router_logits, ids), ids)
    finally:
        rules.override = None

"""Routed layers of transformers' models. Imported for such models only.

T tokens, H hidden size, I intermediate size, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.expert_weights.packing import invalidate
from moe_ops.hf.checkpoints.hook import TransformersHook
from moe_ops.hf.experts.switch import status_of
from moe_ops.hf.models.known import Unknown, find
from moe_ops.layers import Experts, Router, RouterConfig, Routing, SparseMixerRouter, TopKRouter
from moe_ops.layers.routing import RoutingOverride

from .routed_layer import RoutedLayer, Watcher

# Names of blocks' routers.
_ROUTERS = ("gate", "router")


class HFRoutedLayer(RoutedLayer):
    """A block with transformers' experts interface: its router returns (router_logits,
    topk_weights, topk_ids) for the experts. Other blocks derive from this class."""

    _rules: Router | None = None

    # -------------------------------------------------------- what blocks have in ways of their own

    def make_rules(self) -> Router:
        """Returns a `Router` without weights that selects and weights experts from logits like the
        block's router."""
        router: Any = self.router
        num_experts, hidden_size = router.weight.shape
        sizes = hidden_size, num_experts, router.top_k
        if type(router).__name__ == "PhimoeTopKRouter":
            eps = router.router_jitter_noise
            return SparseMixerRouter(*sizes, sparsemixer_eps=eps, device="meta")
        try:
            choice = find("router", router).arguments(router)
        except Unknown as error:
            raise ValueError(
                f"{self.name} must have a router whose way of weighing is known, got "
                f"{type(router).__name__}: {error}."
            ) from None
        del choice["top_k"]
        if "expert_bias" in choice:
            choice["expert_bias"] = True
        bias = getattr(router, "bias", None) is not None
        return TopKRouter(*sizes, **choice, bias=bias, device="meta")

    @property
    def router_rows(self) -> Any:
        """Returns the module with `weight` [E, H] and optionally `bias` [E] of the router."""
        return self.router

    def read(self, output: Any) -> Routing:
        """Converts the router's output to a `Routing`."""
        logits, weights, ids, *_ = output
        return Routing(logits, weights, ids)

    def write(self, output: Any, routing: Routing) -> Any:
        """Returns the router's output for another routing."""
        logits, weights, _, *rest = output
        ids = routing.topk_ids.long()
        return (logits, routing.topk_weights.to(weights.dtype), ids, *rest)

    def put_bank(self, bank: Experts) -> None:
        """Copies the weights of `bank` to the block."""
        experts: Any = self.experts
        up = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
        for name, w in ((up, bank.w_gate_up), ("down_proj", bank.w_down)):
            _put(experts, name, w.transpose(1, 2) if experts.is_transposed else w)
        if experts.has_bias:
            _put(experts, f"{up}_bias", bank.b_gate_up)
            _put(experts, "down_proj_bias", bank.b_down)

    # ------------------------------------------------------------------------- shared by all layers

    @property
    def router(self) -> nn.Module:
        return self.routers[0][1]

    def rules(self, index: int = 0) -> Router:
        if self._rules is None:
            self._rules = self.make_rules().eval()
        bias = getattr(self.router, "e_score_correction_bias", None)
        if bias is not None:  # It may have been trained, moved or loaded meanwhile.
            self._rules.expert_bias = bias
        return self._rules

    @property
    def num_experts(self) -> int:
        return self.router_rows.weight.shape[0]

    def watch(self, watcher: Watcher) -> list[Any]:
        def hook(router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            watcher(args[0].reshape(-1, args[0].shape[-1]), self.read(output))

        return [self.router.register_forward_hook(hook)]

    @contextlib.contextmanager
    def overridden(self, override: RoutingOverride) -> Iterator[None]:
        self.rules()  # Rejects an unknown router before anything runs.

        def hook(router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return self.write(output, self.routed_by(override, self.read(output).router_logits))

        handle = self.router.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def routed_by(self, override: RoutingOverride, router_logits: Tensor) -> Routing:
        rules = self.rules()
        rules.override = override
        try:
            return Routing(router_logits, *rules.route(router_logits))
        finally:
            rules.override = None

    def edit(
        self, experts: Callable[[Experts], Experts], router: Callable[[Router], Router]
    ) -> None:
        if hasattr(self.router, "_moe_ops_fused"):
            raise ValueError(
                f"{self.name} must have transformers' own router to be changed, got an optimized "
                "one; call moe_ops.hf.restore first."
            )
        as_ours, theirs = self.rules(), self.router_rows
        for name in ("weight", "bias"):
            setattr(as_ours, name, getattr(theirs, name, None))
        new_router, new_bank = router(as_ours), experts(self._bank())
        self.put_bank(new_bank)
        for name in ("weight", "bias"):
            if getattr(theirs, name, None) is not None:
                setattr(theirs, name, getattr(new_router, name))
        if new_router.expert_bias is not None:
            _put(self.router, "e_score_correction_bias", new_router.expert_bias)
        sizes = {
            "num_experts": new_bank.num_experts,
            "moe_num_experts": new_bank.num_experts,
            "top_k": new_router.top_k,
            "num_group": new_router.num_groups,
            "topk_group": new_router.num_topk_groups,
        }
        if isinstance(theirs, nn.Linear):
            theirs.out_features = new_bank.num_experts
        for module in self.block.modules():
            for name, value in sizes.items():
                if name in vars(module):
                    setattr(module, name, value)
            invalidate(module)
        self._rules = None

    def _bank(self) -> Experts:
        """Returns an `Experts` with the weights of the block."""
        hook = TransformersHook()
        try:
            found = [hook.weights(m) for m in (self.experts, self.block) if m is not None]
        except ValueError as error:
            raise ValueError(f"{self.name} {error}") from None
        weights = next((w for w in found if w is not None), None)
        parallel = getattr(self.experts, "_is_expert_parallel", False)
        if weights is None or parallel:
            raise ValueError(
                f"{self.name} must have float experts, all of them in this process, to be changed, "
                f"got {type(self.experts or self.block).__name__}."
            )
        parts = weights.gate_up
        w_gate_up = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        bank = Experts(
            weights.num_experts,
            weights.hidden_size,
            weights.intermediate_size,
            bias=weights.b_down is not None,
            device="meta",
            **weights.activation,
        )
        pairs = ("w_gate_up", w_gate_up), ("w_down", weights.down)
        for name, tensor in (*pairs, ("b_gate_up", weights.b_gate_up), ("b_down", weights.b_down)):
            if tensor is not None:
                setattr(bank, name, nn.Parameter(tensor.detach()))
        return bank


class DbrxRoutedLayer(HFRoutedLayer):
    """DBRX: the router returns logits, and the block selects experts."""

    def make_rules(self) -> Router:
        block: Any = self.block
        num_experts, hidden_size = self.router_rows.weight.shape
        p = block.moe_normalize_expert_weights
        return TopKRouter(
            hidden_size,
            num_experts,
            block.top_k,
            renormalize=p is not None,
            renormalize_p=1.0 if p is None else float(p),
            device="meta",
        )

    @property
    def router_rows(self) -> Any:
        router: Any = self.router
        return router.layer

    @property
    def top_k(self) -> int:
        block: Any = self.block
        return block.top_k

    def read(self, output: Any) -> Routing:
        block: Any = self.block
        return Routing(output, *block.route_tokens_to_experts(output))

    @contextlib.contextmanager
    def overridden(self, override: RoutingOverride) -> Iterator[None]:
        block: Any = self.block

        def choose(router_logits: Tensor) -> tuple[Tensor, Tensor]:
            _, weights, ids = self.routed_by(override, router_logits)
            return weights.to(router_logits.dtype), ids.long()

        before = vars(block).get("route_tokens_to_experts")
        try:
            block.route_tokens_to_experts = choose
            yield
        finally:
            if before is None:
                del block.route_tokens_to_experts
            else:
                block.route_tokens_to_experts = before

    def put_bank(self, bank: Experts) -> None:
        experts: Any = self.experts
        gate, up = bank.w_gate_up.chunk(2, dim=1)
        for name, w in (("w1", gate), ("v1", up), ("w2", bank.w_down.transpose(1, 2))):
            _put(experts.mlp, name, w.flatten(0, 1))


class JetMoeRoutedLayer(HFRoutedLayer):
    """JetMoE's feed-forward block, whose router sorts tokens unless it is switched to moe_ops;
    attention experts are not included."""

    def make_rules(self) -> Router:
        num_experts, hidden_size = self.router_rows.weight.shape
        return RouterConfig.from_model_type("jetmoe").build(
            hidden_size, num_experts, self.top_k, device="meta"
        )

    @property
    def router_rows(self) -> Any:
        router: Any = self.router
        return router.layer

    def read(self, output: Any) -> Routing:
        logits = output[4]
        topk_logits, ids = logits.topk(self.top_k, dim=1)
        if output[1] is None:  # Switched to moe_ops: the output contains ids and weights.
            return Routing(logits, output[2], output[0])
        return Routing(logits, topk_logits.softmax(1), ids)

    def write(self, output: Any, routing: Routing) -> Any:
        logits, weights, ids = routing
        weights = weights.to(output[2].dtype)
        if output[1] is None:
            return ids, None, weights, None, logits
        by_expert = ids.flatten().long()
        order = by_expert.argsort(stable=True)
        sizes = by_expert.bincount(minlength=self.num_experts).tolist()
        tokens = order.div(ids.shape[1], rounding_mode="trunc")
        return order, tokens, weights.flatten()[order], sizes, logits

    def put_bank(self, bank: Experts) -> None:
        block: Any = self.block
        _put(block.input_linear, "weight", bank.w_gate_up)
        _put(block.output_linear, "weight", bank.w_down)


class Llama4RoutedLayer(HFRoutedLayer):
    """Llama 4: the router returns the scores of all experts, 0 for unselected ones."""

    def make_rules(self) -> Router:
        num_experts, hidden_size = self.router_rows.weight.shape
        return RouterConfig.from_model_type("llama4").build(
            hidden_size, num_experts, self.top_k, device="meta"
        )

    def read(self, output: Any) -> Routing:
        scores, logits = output
        ids = logits.topk(self.top_k, dim=1).indices
        return Routing(logits, scores.gather(1, ids), ids)

    def write(self, output: Any, routing: Routing) -> Any:
        logits, weights, ids = routing
        if status_of(self.block) != "transformers":
            raise ValueError(
                f"override_routing: {self.name} must be transformers' own block, which computes "
                "all experts, got one on moe_ops; call moe_ops.hf.disable first."
            )
        scores = torch.zeros_like(output[0])
        return scores.scatter_add(1, ids.long(), weights.to(scores.dtype)), logits

    def put_bank(self, bank: Experts) -> None:
        block: Any = self.block
        _put(block.experts, "gate_up_proj", bank.w_gate_up.transpose(1, 2))
        _put(block.experts, "down_proj", bank.w_down.transpose(1, 2))


# By class names of a block; other blocks use the experts interface.
_KINDS = {
    "DbrxFFN": DbrxRoutedLayer,
    "JetMoeMoE": JetMoeRoutedLayer,
    "Llama4TextMoe": Llama4RoutedLayer,
}


def hf_routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Returns the blocks of transformers with feed-forward experts and a router."""
    found: list[RoutedLayer] = []
    for name, block in model.named_modules():
        kinds = [_KINDS[c.__name__] for c in type(block).__mro__ if c.__name__ in _KINDS]
        experts = getattr(block, "experts", None)
        experts = experts if isinstance(experts, nn.Module) else None
        for child_name in _ROUTERS:
            router = getattr(block, child_name, None)
            if not isinstance(router, nn.Module):
                continue
            path = f"{name}.{child_name}" if name else child_name
            if kinds:
                found.append(kinds[0](name, block, [(path, router)], experts))
            elif experts is not None and _is_router(router):
                found.append(HFRoutedLayer(name, block, [(path, router)], experts))
    return found


def _is_router(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__module__.startswith("transformers.")
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and hasattr(module, "top_k")
    )


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Replaces a parameter or buffer, whose shape may change."""
    old: Any = getattr(module, name)
    new = value.detach().to(old).contiguous()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, name, new)

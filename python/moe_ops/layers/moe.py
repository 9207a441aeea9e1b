"""The mixture-of-experts layer: a router, a bank of experts, and shared experts.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .dense_gradient import check_dense_gradient, dense_gradient_weights, with_dense_gradient
from .experts import Experts
from .functional import apply_linear, sigmoid
from .inputs import takes_jagged
from .latent import LatentProjection
from .losses import aux_losses_of, check_aux_losses
from .recompute import LoggedCall, RoutingLog
from .router import Router
from .routing import Routing, check_given, drop_masked, given_routing
from .shared_experts import SharedExperts
from .surgery import layers as surgery


class MoEOutput(NamedTuple):
    """What `MoE` returns with `return_routing=True`.

    Attributes:
        y: [..., H] in the dtype of x.
        router_logits: [T, E], T the product of the leading dimensions of x; None when both ids and
            weights were given, since the router is then not run.
        topk_weights: [T, K] float.
        topk_ids: [T, K] int; -1 marks a slot without an expert.
        aux_losses: name -> scalar, unscaled, for the names given to the layer; differentiable.
    """

    y: Tensor
    router_logits: Tensor | None
    topk_weights: Tensor
    topk_ids: Tensor
    aux_losses: dict[str, Tensor]

    @property
    def routing(self) -> Routing:
        return Routing(self.router_logits, self.topk_weights, self.topk_ids)


class MoE(nn.Module):
    """y = sum_k weight_k * expert_k(x) + shared(x).

    Args:
        router: chooses experts; its num_experts and hidden_size must be those of `experts` (with
            `latent`, its hidden_size that of `latent`).
        experts: the bank.
        shared_experts: a module [T, H] -> [T, H] that every token passes, such as `SharedExperts`.
        shared_expert_gate: a module [T, H] -> [T, 1]; the sigmoid of its output multiplies the
            shared output (Qwen2-MoE).
        latent: the routed experts work in another width, see `LatentProjection`.
        router_gradient: "topk": the router learns from the experts chosen. "dense" (DenseMixer):
            from all, by a straight-through estimate of the gradient of top-k. Outputs and the
            gradients of experts stay the same; a backward pass also costs a forward pass, and the
            down projection once more, of the E - K other experts on every token. For routers whose
            weights are scores (not kind "sparsemixer" or "relu"), and banks of one process. An
            attribute that may be changed at any time. Source: Yao et al. 2025 (DenseMixer:
            Improving MoE Post-Training with Precise Router Gradient).
        aux_losses: which losses to compute when routing is returned: "load_balancing", "router_z",
            "entropy", "mutual_information", "concentration" (see `moe_ops.layers.losses`).
        freeze_routing_in_recompute: under torch.utils.checkpoint, recomputation repeats the choice
            of the first pass even where logits come out slightly different (see
            `moe_ops.layers.recompute`, which also says how it draws one random number a call). Not
            needed when everything before the router is bitwise repeatable. Ignored in compiled
            code.

    Raises:
        ValueError: sizes that do not match, an unknown loss or router_gradient, a router that does
            not go with "dense", a gate without shared experts.
    """

    routing_log: RoutingLog | None
    router_gradient: str = "topk"
    loss_group: Any = None  # Process group whose tokens `aux_losses` are of; may be set any time.

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared_experts: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
        *,
        latent: LatentProjection | None = None,
        router_gradient: str = "topk",
        aux_losses: Sequence[str] = (),
        freeze_routing_in_recompute: bool = False,
    ) -> None:
        super().__init__()
        if latent is not None and latent.latent_size != experts.hidden_size:
            raise ValueError(
                f"MoE: latent must have latent_size = {experts.hidden_size} like the hidden_size "
                f"of experts, got {latent.latent_size}."
            )
        outer: Any = experts if latent is None else latent
        for name, other in (("num_experts", experts), ("hidden_size", outer)):
            if getattr(router, name) != getattr(other, name):
                raise ValueError(
                    f"MoE: router must have {name} = {getattr(other, name)} like "
                    f"{'experts' if other is experts else 'latent'}, got {getattr(router, name)}."
                )
        output_size = getattr(experts, "output_size", experts.hidden_size)
        if output_size != experts.hidden_size:
            raise ValueError(
                f"MoE: experts must have output_size = {experts.hidden_size} like their input, got "
                f"{output_size}."
            )
        if shared_expert_gate is not None and shared_experts is None:
            raise ValueError(
                "MoE: shared_expert_gate must come with shared_experts, got it without."
            )
        if router_gradient not in ("topk", "dense"):
            raise ValueError(
                f"MoE: router_gradient must be 'topk' or 'dense', got {router_gradient!r}."
            )
        if router_gradient == "dense":
            check_dense_gradient(router, experts)
        check_aux_losses("MoE", aux_losses)
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.shared_expert_gate = shared_expert_gate
        self.latent = latent
        self.router_gradient = router_gradient
        self.aux_losses = tuple(aux_losses)
        self.freeze_routing_in_recompute = freeze_routing_in_recompute
        self.routing_log = RoutingLog() if freeze_routing_in_recompute else None

    @classmethod
    def build(
        cls,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        router: str | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        precision: str | None = None,
        router_bias: bool | None = None,
        latent_size: int | None = None,
        latent_norm: bool = False,
        router_gradient: str = "topk",
        aux_losses: Sequence[str] = (),
        freeze_routing_in_recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_kwargs: Any,
    ) -> MoE:
        """A layer from sizes.

        Args:
            hidden_size, intermediate_size, num_experts, top_k: H, I, E and K.
            num_shared_experts: shared experts of width I (as one network of the summed width).
            shared_intermediate_size: total width of the shared network, instead of the former.
            shared_expert_gate: gate the shared output by a sigmoid of x (a linear map H -> 1).
            router: name of a model to route like, see `Router.like`.
            activation, bias, interleaved, alpha, limit, precision: of `Experts`; the shared network
                has the same activation, no biases and no other precision.
            router_bias: bias of the router's linear map; None leaves it to `router`.
            latent_size, latent_norm: width of the routed experts, and a norm of their sum, see
                `LatentProjection`. None: H, without one.
            router_gradient, aux_losses, freeze_routing_in_recompute: as for MoE.
            device, dtype: of all parameters.
            router_kwargs: any other argument of `Router`.
        """
        if router_bias is not None:
            router_kwargs["bias"] = router_bias
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        router_kwargs |= where
        if router is None:
            made_router = Router(hidden_size, num_experts, top_k, **router_kwargs)
        else:
            made_router = Router.like(router, hidden_size, num_experts, top_k, **router_kwargs)
        if latent_norm and latent_size is None:
            raise ValueError("MoE.build: latent_norm must come with latent_size, got it alone.")
        latent = None
        if latent_size is not None:
            latent = LatentProjection(hidden_size, latent_size, norm=latent_norm, **where)
        experts = Experts(
            num_experts,
            hidden_size if latent_size is None else latent_size,
            intermediate_size,
            activation=activation,
            bias=bias,
            interleaved=interleaved,
            alpha=alpha,
            limit=limit,
            precision=precision,
            **where,
        )
        width = shared_intermediate_size or num_shared_experts * intermediate_size
        shared = gate = None
        if width:
            shared = SharedExperts(
                hidden_size, width, activation=activation, alpha=alpha, limit=limit, **where
            )
        if shared_expert_gate:
            gate = nn.Linear(hidden_size, 1, bias=False, **where)
        return cls(
            made_router,
            experts,
            shared,
            gate,
            latent=latent,
            router_gradient=router_gradient,
            aux_losses=aux_losses,
            freeze_routing_in_recompute=freeze_routing_in_recompute,
        )

    @takes_jagged
    def forward(
        self,
        x: Tensor,
        *,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | MoEOutput:
        """The layer's output: a tensor, or a MoEOutput with `return_routing=True`.

        Args:
            x: [..., H] in the dtype of the experts (any under autocast). No tokens is fine. Jagged
                [B, j*, H] (torch.nested) is, too: y then has its offsets, and the other arguments
                of the tokens may be jagged.
            topk_ids: [..., K'] or [T, K'] int32 or int64, a choice to use instead of the router's;
                ids outside [0, E) contribute nothing. K' is free. Alone, its weights are what the
                router gives these experts (`Router.weights_at`).
            topk_weights: [..., K'] or [T, K'] float, only with `topk_ids`; the router is not run.
            expert_mask: [E] bool, True where the expert may be used. The router chooses as if the
                others did not exist, which is what `select` makes permanent; given ids of masked
                experts are dropped to -1.
            token_mask: bool, one element a token, True where the token counts in `aux_losses`. All
                tokens are computed.
            return_routing: return MoEOutput and compute `aux_losses`, which see the logits of all
                experts, masked or not.

        Raises:
            ValueError: `topk_weights` without `topk_ids`, or shapes that do not match.
        """
        hidden_size = self.router.hidden_size
        if x.shape[-1] != hidden_size:
            raise ValueError(f"MoE: x must be [..., {hidden_size}], got shape {list(x.shape)}.")
        flat = x.reshape(-1, hidden_size)
        topk_ids, topk_weights = check_given("MoE", topk_ids, topk_weights, flat.shape[0])
        routing = self._route(flat, topk_ids, topk_weights, expert_mask)
        y = self._run_experts(flat, routing, expert_mask).view(x.shape)
        if not return_routing:
            return y
        aux = aux_losses_of(self.aux_losses, self.router, routing, token_mask, self.loss_group)
        return MoEOutput(y, *routing, aux)

    def _run_experts(self, flat: Tensor, routing: Routing, expert_mask: Tensor | None) -> Tensor:
        """What the experts and the shared experts make of the tokens [T, H]. Shared experts run
        while a dispatcher has tokens on their way, and after the others where there is none."""
        logits, weights, ids = routing
        how: dict[str, Any] = {
            "apply_router_weight_on_input": self.router.apply_router_weight_on_input
        }
        x = flat if self.latent is None else self.latent.enter(flat)
        shared: list[Tensor] = []
        if (
            self.shared_experts is not None
            and getattr(self.experts, "dispatcher", None) is not None
        ):
            how["overlap"] = lambda: shared.append(self._run_shared(flat))
        others = None
        wants_others = self.router_gradient == "dense" and torch.is_grad_enabled()
        if wants_others and logits is not None and logits.requires_grad:
            check_dense_gradient(self.router, self.experts)
            weights, *others = dense_gradient_weights(self.router, routing, expert_mask)
        y: Tensor = self.experts(x, weights, ids, **how)
        if others is not None:
            y = with_dense_gradient(y, x, others[0], others[1], self.experts)
        if self.latent is not None:
            y = self.latent.leave(y)
        if self.shared_experts is None:
            return y
        return y + (shared[0] if shared else self._run_shared(flat))

    def _run_shared(self, flat: Tensor) -> Tensor:
        assert self.shared_experts is not None
        shared: Tensor = self.shared_experts(flat)
        if self.shared_expert_gate is None:
            return shared
        return sigmoid(apply_linear(self.shared_expert_gate, flat)) * shared

    def _route(
        self,
        flat: Tensor,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
        expert_mask: Tensor | None,
    ) -> Routing:
        # Compiled graphs are traced once, and decide on recomputation by themselves.
        log = None if torch.compiler.is_compiling() else self.routing_log
        if log is not None and not log.applies(self.training):
            log = None
        key, call = (None, None) if log is None else log.begin(self.training)
        if topk_ids is not None and topk_weights is not None:
            routing = given_routing(topk_ids, topk_weights, expert_mask)
        elif topk_ids is not None or call is None:
            routing = self.router(flat, topk_ids=topk_ids, expert_mask=expert_mask)
        else:
            routing = self._repeat_or_choose(flat, call, expert_mask)
        if log is not None and call is not None:
            log.finish(key, call, routing, self.training)
        return routing

    def _repeat_or_choose(
        self, flat: Tensor, call: LoggedCall, expert_mask: Tensor | None
    ) -> Routing:
        """Routing in two steps, ids and then their weights, so that a forward which repeats ids
        saves the same tensors for backward as the one that chose them: checkpointing checks it."""
        router = self.router
        logits = router.logits(flat)
        if call.choice is None or router.draws_random_numbers or router.override is not None:
            ids = router.choose(logits, expert_mask=expert_mask)
        if call.choice is None:
            router.count(ids, logits, expert_mask)
        else:
            ids = call.choice.topk_ids
            if ids.shape[0] != flat.shape[0]:
                raise ValueError(
                    f"MoE: x must have {ids.shape[0]} tokens, as the routing to repeat has, got "
                    f"{flat.shape[0]}."
                )
            ids = drop_masked(ids, expert_mask)
        if not call.use_weights:
            return Routing(logits, router.weights_at(logits, ids, expert_mask=expert_mask), ids)
        assert call.choice is not None
        return Routing(logits, call.choice.topk_weights.masked_fill(ids < 0, 0.0), ids)

    def pack_weights(self) -> int:
        """Packs the experts' weights now, see `moe_ops.pack_weights`; returns the copies' bytes."""
        return self.experts.pack_weights()

    def unpack_weights(self) -> int:
        """Drops the experts' packed copies, if there are any; returns their bytes."""
        return self.experts.unpack_weights()

    # ------------------------------------------------------------------- operations on the experts

    def select(self, ids: Sequence[int] | Tensor, **changes: Any) -> MoE:
        """A new layer of the experts `ids`: `Experts.select` and `Router.select` together.

        Computes what this layer computes with an `expert_mask` of these experts.

        Args:
            ids: experts to keep, in the order wanted.
            changes: top_k, num_groups, num_topk_groups of the new router.

        All such operations copy the shared experts and their gate, so that the new layer shares no
        parameter with this one.
        """
        return surgery.select(self, ids, changes)

    def append(
        self,
        other: int | MoE,
        *,
        init: str = "random",
        router_init: str | None = None,
        **changes: Any,
    ) -> MoE:
        """A new layer with experts added at the end: `Experts.append` and `Router.append`.

        Args:
            other: the number of experts to add, or a layer whose routed experts and router rows to
                add (its shared experts are not).
            init: of the experts: "random", "zero_output", "copy" or "mean".
            router_init: of the rows: "random", "copy" or "mean"; None is `init`, or "random" where
                that is no choice for rows.
            changes: top_k, num_groups, num_topk_groups of the new router.
        """
        return surgery.append(self, other, init, router_init, changes)

    def split(
        self,
        ids: Sequence[int] | Tensor | None = None,
        factor: int = 2,
        *,
        mode: str = "slice",
        noise: float = 0.0,
    ) -> MoE:
        """A new layer with experts split: `Experts.split` and `Router.split`.

        mode="slice" over all experts computes the same function with E * factor experts of
        intermediate size I / factor, K * factor of them a token.
        """
        return surgery.split(self, ids, factor, mode, noise)

    def merge(
        self,
        groups: Sequence[Sequence[int]],
        weights: Tensor | Sequence[float] | None = None,
        *,
        mode: str = "mean",
        neuron_order: Tensor | None = None,
        **changes: Any,
    ) -> MoE:
        """A new layer with one expert for each group: `Experts.merge` and `Router.merge`.

        mode="concat" of the slices of `split` restores the layer that was split.

        Args:
            changes: top_k, num_groups, num_topk_groups of the new router.
        """
        return surgery.merge_experts(self, groups, weights, mode, neuron_order, changes)

    def rebuild(self, router: Router, experts: Experts) -> MoE:
        """A layer like this one with another router and other experts, and copies of the rest."""
        result = MoE(
            router,
            experts,
            copy.deepcopy(self.shared_experts),
            copy.deepcopy(self.shared_expert_gate),
            latent=copy.deepcopy(self.latent),
            router_gradient=self.router_gradient,
            aux_losses=self.aux_losses,
            freeze_routing_in_recompute=self.freeze_routing_in_recompute,
        )
        return result.train(self.training)

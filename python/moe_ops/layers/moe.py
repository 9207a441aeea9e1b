"""The mixture-of-experts layer: a router, experts and shared experts.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import MoEConfig
from .dense_gradient import check_dense_gradient, dense_gradient_weights, with_dense_gradient
from .expert_ops import layers as expert_ops
from .experts import Experts
from .functional import apply_linear, sigmoid
from .inputs import takes_jagged
from .latent import LatentProjection
from .losses import aux_losses_of, check_aux_losses
from .recompute import LoggedCall, RoutingLog
from .router import Router
from .routing import Routing, check_given, drop_masked, given_routing
from .shared_experts import SharedExperts


class MoEOutput(NamedTuple):
    """Output of `MoE` with `return_routing=True`.

    Attributes:
        y: [..., H] in the dtype of x.
        router_logits: [T, E], T the product of the leading dimensions of x; None if both ids and
            weights were given, because the router does not run.
        topk_weights: [T, K] float.
        topk_ids: [T, K] int; -1 marks an empty slot.
        aux_losses: name -> scalar, unscaled and differentiable, for the losses of the layer.
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
    """Mixture-of-experts layer y = sum_k weight_k * expert_k(x) + shared(x).

    Args:
        router: selects experts; its num_experts and hidden_size must equal those of `experts` (with
            `latent`, its hidden_size that of `latent`).
        experts: the routed experts.
        shared_experts: a module [T, H] -> [T, H] applied to every token, such as `SharedExperts`.
        shared_expert_gate: a module [T, H] -> [T, 1]; the sigmoid of its output multiplies the
            shared output (Qwen2-MoE).
        latent: projects to and from another width of the routed experts, see `LatentProjection`.
        router_gradient: "topk": the router learns from the selected experts. "dense" (DenseMixer):
            from all experts, by a straight-through estimate of the gradient of top-k selection.
            Outputs and the gradients of experts are unchanged. Backward additionally costs a
            forward pass, and the down projection once more, of the E - K other experts on every
            token. Requires routers whose weights are scores (not kind "sparsemixer" or "relu"), and
            experts in one process. This attribute may be changed at any time. Source: Yao et al.
            2025 (DenseMixer: Improving MoE Post-Training with Precise Router Gradient).
        aux_losses: losses to compute when routing is returned: "load_balancing", "router_z",
            "entropy", "mutual_information", "concentration" (see `moe_ops.layers.losses`).
        freeze_routing_in_recompute: under torch.utils.checkpoint, recomputation repeats the top-k
            selection of the first pass even if logits differ slightly. It draws one random number
            per call, see `moe_ops.layers.recompute`. Not needed if everything before the router is
            bitwise repeatable. Ignored in compiled code.

    Raises:
        ValueError: sizes that do not match, an unknown loss or router_gradient, a router that does
            not support "dense", a gate without shared experts.
    """

    routing_log: RoutingLog | None
    router_gradient: str = "topk"
    loss_group: Any = None  # Process group of the tokens in `aux_losses`; may be set at any time.

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
    def from_config(
        cls,
        config: MoEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MoE:
        """Returns a new layer with the sizes and parts of `config`.

        Args:
            config: see `MoEConfig`.
            device, dtype: of all parameters.

        Raises:
            ValueError: an invalid size or combination.
        """
        c = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if c.latent_norm and c.latent_size is None:
            raise ValueError("MoEConfig: latent_norm must come with latent_size, got it alone.")
        router = c.router.build(c.hidden_size, c.num_experts, c.top_k, **where)
        latent = None
        if c.latent_size is not None:
            latent = LatentProjection(c.hidden_size, c.latent_size, norm=c.latent_norm, **where)
        width = c.hidden_size if c.latent_size is None else c.latent_size
        experts = Experts(
            c.num_experts, width, c.intermediate_size, **dataclasses.asdict(c.experts), **where
        )
        shared = gate = None
        if c.shared_intermediate_size:
            shared = SharedExperts(
                c.hidden_size,
                c.shared_intermediate_size,
                activation=c.experts.activation,
                alpha=c.experts.alpha,
                limit=c.experts.limit,
                **where,
            )
        if c.shared_expert_gate:
            gate = nn.Linear(c.hidden_size, 1, bias=False, **where)
        return cls(
            router,
            experts,
            shared,
            gate,
            latent=latent,
            router_gradient=c.router_gradient,
            aux_losses=c.aux_losses,
            freeze_routing_in_recompute=c.freeze_routing_in_recompute,
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
        """Computes the layer's output: a tensor, or a MoEOutput with `return_routing=True`.

        Args:
            x: [..., H] in the dtype of the experts (any under autocast); may have no tokens. x may
                be jagged [B, j*, H] (torch.nested): y then has its offsets, and other per-token
                arguments may be jagged.
            topk_ids: [..., K'] or [T, K'] int32 or int64, a selection that replaces the router's;
                ids outside [0, E) contribute nothing. K' is free. Without `topk_weights`, the
                router computes the weights of these experts (`Router.weights_at`).
            topk_weights: [..., K'] or [T, K'] float, only with `topk_ids`; the router does not run.
            expert_mask: [E] bool, True for allowed experts. The router ignores all others; `select`
                makes this permanent. Given ids of masked experts become -1.
            token_mask: bool, one element per token, True if the token counts in `aux_losses`. All
                tokens are computed.
            return_routing: return MoEOutput and compute `aux_losses`, which use the logits of all
                experts, masked or not.

        Raises:
            ValueError: `topk_weights` without `topk_ids`, or shapes that do not match.
        """
        hidden_size = self.router.hidden_size
        if x.shape[-1] != hidden_size:
            raise ValueError(f"MoE: x must be [..., {hidden_size}], got shape {list(x.shape)}.")
        flat = x if x.dim() == 2 else x.reshape(-1, hidden_size)
        if topk_ids is not None or topk_weights is not None:
            topk_ids, topk_weights = check_given("MoE", topk_ids, topk_weights, flat.shape[0])
        routing = self._route(flat, topk_ids, topk_weights, expert_mask)
        y = self._run_experts(flat, routing, expert_mask)
        if flat is not x:
            y = y.view(x.shape)
        if not return_routing:
            return y
        aux = aux_losses_of(self.aux_losses, self.router, routing, token_mask, self.loss_group)
        return MoEOutput(y, *routing, aux)

    def _run_experts(self, flat: Tensor, routing: Routing, expert_mask: Tensor | None) -> Tensor:
        """Runs routed and shared experts on tokens [T, H]. With a dispatcher, shared experts
        overlap communication; otherwise they run last."""
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
        # Compiled graphs are traced once, and the compiler controls recomputation.
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
        """Routes in two steps, ids and then weights, so that a forward with repeated ids saves the
        same tensors for backward as the original one, which checkpointing verifies."""
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
        """Packs the experts' weights now and returns the bytes of the copies; see
        `moe_ops.pack_weights`."""
        return self.experts.pack_weights()

    def unpack_weights(self) -> int:
        """Drops the experts' packed copies, if any, and returns their bytes."""
        return self.experts.unpack_weights()

    # ------------------------------------------------------------------- operations on the experts

    def select(self, ids: Sequence[int] | Tensor, **changes: Any) -> MoE:
        """Returns a new layer with the experts `ids`, by `Experts.select` and `Router.select`.

        It computes the function of this layer with an `expert_mask` of these experts.

        Args:
            ids: experts to keep, in their new order.
            changes: top_k, num_groups, num_topk_groups of the new router.

        Operations on experts copy the shared experts and their gate, so that the new layer shares
        no parameters with this one.
        """
        return expert_ops.select(self, ids, changes)

    def append(
        self,
        other: int | MoE,
        *,
        init: str = "random",
        router_init: str | None = None,
        **changes: Any,
    ) -> MoE:
        """Returns a new layer with experts appended, by `Experts.append` and `Router.append`.

        Args:
            other: the number of experts to add, or a layer whose routed experts and router rows to
                add (not its shared experts).
            init: initial values of the experts: "random", "zero_output", "copy" or "mean".
            router_init: initial values of the router's rows: "random", "copy" or "mean"; None is
                `init`, or "random" for "zero_output".
            changes: top_k, num_groups, num_topk_groups of the new router.
        """
        return expert_ops.append(self, other, init, router_init, changes)

    def split(
        self,
        ids: Sequence[int] | Tensor | None = None,
        factor: int = 2,
        *,
        mode: str = "slice",
        noise: float = 0.0,
    ) -> MoE:
        """Returns a new layer with split experts, by `Experts.split` and `Router.split`.

        With mode="slice" and all experts, it computes the same function with E * factor experts of
        intermediate size I / factor, K * factor of them per token.
        """
        return expert_ops.split(self, ids, factor, mode, noise)

    def merge(
        self,
        groups: Sequence[Sequence[int]],
        weights: Tensor | Sequence[float] | None = None,
        *,
        mode: str = "mean",
        neuron_order: Tensor | None = None,
        **changes: Any,
    ) -> MoE:
        """Returns a new layer with one expert per group, by `Experts.merge` and `Router.merge`.

        mode="concat" on the slices from `split` restores the original layer.

        Args:
            changes: top_k, num_groups, num_topk_groups of the new router.
        """
        return expert_ops.merge(self, groups, weights, mode, neuron_order, changes)

    def rebuild(self, router: Router, experts: Experts) -> MoE:
        """Returns a layer like this one with another router and other experts, and copies of the
        rest."""
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

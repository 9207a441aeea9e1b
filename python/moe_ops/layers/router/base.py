"""Abstract base class of all routers, which map tokens to experts and routing weights.

A new routing method is a subclass that overrides `choose_experts`, and `weights_of` if the weights
are not the scores of the selected experts. `select`, `append`, `split` and `merge` work for it too
if its constructor's keyword arguments are attributes of the same names.

Letters: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops.formulas.scores import router_scores

from ..expert_ops import router_rows as expert_ops
from ..functional import router_logits
from ..inputs import takes_dense
from ..recompute import in_backward
from ..routing import Routing, RoutingOverride, drop_masked, mask_logits, valid_ids
from ..stats import count_tokens_per_expert, moved_counts
from .options import check, options_of


class Router(nn.Module):
    """Abstract linear router: logits = x W^T + b, from which a subclass selects experts.

    - `TopKRouter` selects the K experts with the best scores.
    - `TopPRouter` selects the smallest set of experts whose probabilities reach `top_p`.
    - `ExpertChoiceRouter` lets each expert take its best tokens.
    - `SparseMixerRouter` samples experts in training.
    - `ReLURouter` selects all experts with a positive logit.
    - `HashRouter` selects experts by token id.
    - `CapacityRouter` is a `TopKRouter` that drops tokens over an expert's capacity.

    Parameters and buffers:
        weight: [E, H]. bias: [E], with `bias=True`.
        expert_bias: [E] fp32 buffer, with `expert_bias=True` (`TopKRouter`).

    Args:
        hidden_size: H.
        num_experts: E >= 1.
        top_k: K in [1, E]; for `ExpertChoiceRouter` the mean number of experts per token.
        bias: if True, the linear map has a bias.
        jitter: in training, the router multiplies a copy of x by uniform random numbers in [1 -
            jitter, 1 + jitter]; the experts use x without jitter.
        logits_dtype: dtype of the linear map, also under autocast (torch.float32 for half-precision
            models). None uses the dtype of x and weight, or autocast's.
        apply_router_weight_on_input: `MoE` multiplies the experts' input by the weights instead of
            their output (Llama 4).
        device, dtype: of weight and bias.

    Initialization: weight uniform in +-1/sqrt(H) like nn.Linear; bias and expert_bias 0.

    Raises:
        ValueError: an invalid size or combination of arguments.
    """

    kind: str = ""
    # How weights follow from logits. Subclasses set the options that are not constructor arguments.
    score_func: str = "softmax"
    topk_first: bool = False
    renormalize: bool = False
    renormalize_p: float = 1.0
    routed_scaling_factor: float = 1.0
    # Expert groups; 1 disables group-limited routing.
    num_groups: int = 1
    num_topk_groups: int = 1
    group_score: str = "max"
    # True if top-k selection draws random numbers in training. A forward that reuses a stored
    # selection then draws them too, so that the generator state afterwards does not depend on the
    # reuse.
    draws_random_numbers: bool = False
    # If True, `split` may turn each expert into slices that are always selected together.
    splits_into_slices: ClassVar[bool] = False
    # Set temporarily by `moe_ops.surgery.override_routing`.
    override: RoutingOverride | None = None

    expert_bias: Tensor | None
    tokens_per_expert: Tensor | None

    # Router classes by the names that `RouterConfig` uses.
    kinds: ClassVar[dict[str, type[Router]]] = {}

    def __init_subclass__(cls, kind: str | None = None, **rest: Any) -> None:
        """Registers the class: `class MyRouter(Router, kind="mine")` lets `RouterConfig("mine")`
        build a MyRouter."""
        super().__init_subclass__(**rest)
        if kind is not None:
            cls.kind = kind
            Router.kinds[kind] = cls

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        jitter: float = 0.0,
        logits_dtype: torch.dtype | None = None,
        apply_router_weight_on_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check(hidden_size >= 1, f"hidden_size must be at least 1, got {hidden_size}")
        check(num_experts >= 1, f"num_experts must be at least 1, got {num_experts}")
        check(
            1 <= top_k <= num_experts,
            f"top_k must be in [1, num_experts = {num_experts}], got {top_k}",
        )
        check(0 <= jitter < 1, f"jitter must be in [0, 1), got {jitter}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.jitter = jitter
        self.logits_dtype = logits_dtype
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(self.weight.new_empty(num_experts)) if bias else None
        self.register_buffer("expert_bias", None)
        self.tokens_per_expert = None
        self.reset_parameters()

    def keep_expert_bias(self) -> None:
        """Adds the buffer `expert_bias` and the counter that `update_expert_bias` reads.
        Constructors of routers whose selection uses the bias call it."""
        weight = self.weight
        self.expert_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=weight.device)
        # Not a buffer: DistributedDataParallel would overwrite it with the counts of rank 0.
        self.tokens_per_expert = torch.zeros(
            self.num_experts, dtype=torch.int64, device=weight.device
        )

    def reset_parameters(self) -> None:
        """Draws the initial values described in the class docstring."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    # ----------------------------------------------------------------------------------- routing

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Selects experts and computes their routing weights; subclasses implement it.

        Args:
            router_logits: [T, E] float; masked experts have the lowest finite value.
            expert_mask: [E] bool or None. Slots assigned to masked experts are emptied afterwards.

        Returns:
            topk_weights [T, K'] fp32 (fp64 for fp64) and topk_ids [T, K'] int32; ties go to the
            smaller id.
        """
        raise NotImplementedError(f"{type(self).__name__} must override choose_experts.")

    def weights_of(self, router_logits: Tensor, topk_ids: Tensor) -> Tensor:
        """Computes the weights that `choose_experts` returns if it selects the given ids.

        The default takes the scores of the experts, divides them by their norm with `renormalize`,
        and multiplies them by `routed_scaling_factor`.

        Args:
            router_logits: [T, E] fp32 or fp64.
            topk_ids: [T, K']; ids outside [0, E) must get weight 0 and must not affect other
                weights.
        """
        valid, ids = valid_ids(topk_ids, self.num_experts)
        if self.score_func != "softmax":
            weights = router_scores(router_logits.gather(1, ids), self.score_func)
        elif self.topk_first:
            chosen = router_logits.gather(1, ids)
            weights = chosen.masked_fill(~valid, torch.finfo(chosen.dtype).min).softmax(-1)
        else:
            weights = router_logits.softmax(-1).gather(1, ids)
        weights = weights.masked_fill(~valid, 0.0)
        if self.renormalize:
            weights = self._normalize(weights)
        return weights * self.routed_scaling_factor

    def _normalize(self, weights: Tensor) -> Tensor:
        if self.renormalize_p == 1:
            return weights / (weights.sum(-1, keepdim=True) + 1e-20)
        norm = torch.linalg.vector_norm(weights, self.renormalize_p, dim=-1, keepdim=True)
        return weights / (norm + 1e-20)

    @takes_dense
    def forward(
        self, x: Tensor, *, topk_ids: Tensor | None = None, expert_mask: Tensor | None = None
    ) -> Routing:
        """Routes T tokens.

        Args:
            x: [T, H] float.
            topk_ids: [T, K'] int32 or int64, a given selection: only its weights are computed, see
                `weights_at`. K' is free.
            expert_mask: [E] bool, True for allowed experts. Routing ignores all others
                (kind="expert_choice" keeps the capacity of all E). Slots without an allowed expert,
                and given ids of masked experts, become -1 with weight 0.

        Returns:
            Routing(router_logits, topk_weights, topk_ids).
        """
        if topk_ids is not None:
            logits = self.logits(x)
            ids = drop_masked(topk_ids, expert_mask)
            return Routing(logits, self.weights_at(logits, ids, expert_mask=expert_mask), ids)
        routing = self._route_tokens(x, expert_mask)
        if self.training:
            self.count(routing.topk_ids, routing.router_logits, expert_mask)
        return routing

    def _route_tokens(self, x: Tensor, expert_mask: Tensor | None) -> Routing:
        logits = self.logits(x)
        return Routing(logits, *self.route(logits, expert_mask=expert_mask))

    def logits(self, x: Tensor) -> Tensor:
        """Computes router_logits [T, E] from x [T, H]: jitter (in training), then the linear
        map."""
        return router_logits(self._jittered(x), self.weight, self.bias, self.logits_dtype)

    def _jittered(self, x: Tensor) -> Tensor:
        if not self.training or self.jitter == 0:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)

    def route(
        self, router_logits: Tensor, *, expert_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns topk_weights and topk_ids for router_logits [T, E]; ties go to the smaller id."""
        if self.override is not None:
            return self.override.route(self, router_logits, expert_mask)
        logits = mask_logits(router_logits, expert_mask)
        weights, ids = self.choose_experts(logits, expert_mask)
        if expert_mask is not None:
            ids = drop_masked(ids, expert_mask)
            weights = weights.masked_fill(ids < 0, 0.0)
        return weights, ids

    def choose(self, router_logits: Tensor, *, expert_mask: Tensor | None = None) -> Tensor:
        """Returns topk_ids [T, K] for router_logits [T, E], without a gradient; see `route`."""
        with torch.no_grad():
            return self.route(router_logits.detach(), expert_mask=expert_mask)[1]

    def weights_at(
        self, router_logits: Tensor, topk_ids: Tensor, *, expert_mask: Tensor | None = None
    ) -> Tensor:
        """Computes the weights that `route` returns if it selects `topk_ids`.

        Args:
            router_logits: [T, E].
            topk_ids: [T, K'] int32 or int64; ids outside [0, E) get weight 0 and are excluded from
                normalization. Experts may repeat.
            expert_mask: [E] bool as in `forward`.

        Returns:
            topk_weights: [T, K'] fp32 (fp64 for fp64), differentiable in the logits.

        Raises:
            ValueError: shapes that do not match.
        """
        logits = router_logits
        if topk_ids.dim() != 2 or topk_ids.shape[0] != logits.shape[0]:
            raise ValueError(
                f"Router: topk_ids must be [{logits.shape[0]}, K] like router_logits, got shape "
                f"{list(topk_ids.shape)}."
            )
        logits = mask_logits(logits, expert_mask)
        logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        weights = self.weights_of(logits, topk_ids)
        return weights if self.override is None else self.override.weigh(self, weights, topk_ids)

    def count(
        self,
        topk_ids: Tensor,
        router_logits: Tensor | None = None,
        expert_mask: Tensor | None = None,
    ) -> None:
        """Adds a selection to `tokens_per_expert`, in training with an expert_bias.

        Does nothing while activations are recomputed, because the forward already counted the
        selection. (A compiled layer inside an eager checkpoint cannot detect recomputation and
        counts twice. All loads double, and `update_expert_bias` is unaffected.)
        """
        if self.training and self.tokens_per_expert is not None and not in_backward():
            with torch.no_grad():
                self.tokens_per_expert.add_(count_tokens_per_expert(topk_ids, self.num_experts))

    # ------------------------------------------------------------------- operations on the experts

    def select(
        self,
        ids: Sequence[int] | Tensor,
        *,
        top_k: int | None = None,
        num_groups: int | None = None,
        num_topk_groups: int | None = None,
    ) -> Router:
        """Returns a new router with the rows of `ids`, in that order (repeats allowed).

        Args:
            ids: experts to keep, in [0, E).
            top_k: K of the result; None keeps it, an error if fewer experts are left.
            num_groups, num_topk_groups: groups of the result. None derives them from the old
                groups: each new group must consist of experts of one old group, and all groups must
                have one size.

        Returns:
            A router with its own parameters (dtype, device and requires_grad kept).

        Raises:
            ValueError: ids out of range, top_k too large, or groups that no longer divide.
        """
        return expert_ops.select(self, ids, top_k, num_groups, num_topk_groups)

    def append(
        self,
        other: int | Router,
        *,
        init: str = "random",
        top_k: int | None = None,
        num_groups: int | None = None,
        num_topk_groups: int | None = None,
    ) -> Router:
        """Returns a new router with rows appended.

        Args:
            other: the number of rows to add (at least 1), or a Router whose rows to add.
            init: initial values if `other` is a number: "random" (like a new router, with bias 0
                and the mean of the old expert_bias), "copy" (rows 0, 1, ... again), "mean" (the
                mean row).
            top_k, num_groups, num_topk_groups: values of the result; None keeps them, an error with
                more than one group because experts would change groups.

        Raises:
            ValueError: an unknown `init`, a number below 1, incompatible routers, or groups that no
                longer divide.
        """
        return expert_ops.append(self, other, init, top_k, num_groups, num_topk_groups)

    def split(
        self, ids: Sequence[int] | Tensor | None = None, factor: int = 2, *, mode: str = "slice"
    ) -> Router:
        """Returns a new router for `Experts.split` with the same arguments: rows repeat in place.

        With mode="slice", all slices of an expert are selected together. top_k is multiplied by
        `factor`, routed_scaling_factor is adjusted because the slices share the weight, and an
        expert_bias on softmax scores shrinks with the scores, so that `MoE.split` computes the same
        function. This requires kind="topk", all experts, and group_score="max" if there are groups.
        With mode="copy", top_k is unchanged; copies tie, so the first one wins until training
        separates them.

        Raises:
            ValueError: one of these conditions does not hold, or groups become uneven.
        """
        return expert_ops.split(self, ids, factor, mode)

    def merge(
        self,
        groups: Sequence[Sequence[int]],
        weights: Tensor | Sequence[float] | None = None,
        *,
        mode: str = "mean",
        top_k: int | None = None,
        num_groups: int | None = None,
        num_topk_groups: int | None = None,
    ) -> Router:
        """Returns a new router for `Experts.merge`: each row is the weighted mean of a group of
        rows.

        With mode="concat" top_k, routed_scaling_factor and expert_bias undo what `split` with
        mode="slice" did. Groups of group-limited routing are derived as in `select`, from the first
        id of each group.

        Raises:
            ValueError: invalid sizes or ids; top_k larger than the number of groups; mode="concat"
                with groups whose size does not divide top_k.
        """
        return expert_ops.merge(self, groups, weights, mode, top_k, num_groups, num_topk_groups)

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments for a router like this one, without device and dtype."""
        made = {
            name: getattr(self, name)
            for name in options_of(type(self))
            if name not in ("bias", "expert_bias", "device", "dtype")
        }
        made["bias"] = self.bias is not None
        if self.expert_bias is not None:
            made["expert_bias"] = True
        return made

    def with_rows(self, num_experts: int, top_k: int, **changes: Any) -> Router:
        """Returns a router like this one with other sizes and uninitialized rows.

        It is on the meta device, where initialization draws no random numbers. Options of one group
        are dropped for routers without groups.
        """
        options = {**self.options(), **changes}
        for name in ("num_groups", "num_topk_groups"):
            if options.get(name) == 1 and name not in options_of(type(self)):
                del options[name]
        return type(self)(self.hidden_size, num_experts, top_k, device="meta", **options)

    # ------------------------------------------------------------------------------ module hooks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            # Half precision would round away the small increments of the bias.
            device = after.device
            on_meta = "meta" in (before.device.type, device.type)
            self.expert_bias = (
                torch.empty_like(before, device=device) if on_meta else before.to(device)
            )
        if self.tokens_per_expert is not None:
            self.tokens_per_expert = moved_counts(self.tokens_per_expert, self.weight.device)
        return self

    def extra_repr(self) -> str:
        words = [
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"kind={self.kind!r}, score_func={self.score_func!r}"
        ]
        words += [n for n in ("topk_first", "renormalize") if getattr(self, n)]
        if self.num_groups > 1:
            words.append(f"groups={self.num_topk_groups} of {self.num_groups}")
        if self.expert_bias is not None:
            words.append("expert_bias")
        return ", ".join(words)

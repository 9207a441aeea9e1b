"""The base of all routers: from tokens to the experts they go to and their weights.

A new way of routing is a subclass that overrides `choose_experts`, and `weights_of` where the
weights of a choice are not the scores of the experts chosen. Where its constructor's keyword
arguments are attributes of the same names, `select`, `append`, `split` and `merge` work for it too.

Letters: T tokens, H hidden size, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops.formulas.scores import router_scores

from ..functional import router_logits
from ..inputs import takes_dense
from ..recompute import in_backward
from ..routing import Routing, RoutingOverride, drop_masked, mask_logits, valid_ids
from ..stats import count_tokens_per_expert, moved_counts
from ..surgery import router_rows as surgery
from .options import check, options_of
from .presets import PRESETS


class Router(nn.Module):
    """Linear router: logits = x W^T + b, then a choice of experts and their weights.

    `Router(..., kind=...)` makes a router of the class of that kind, whose docstring describes its
    further arguments:

    - "topk" (`TopKRouter`): the K experts of the best scores.
    - "topp" (`TopPRouter`): the smallest set of experts whose probabilities reach `top_p`.
    - "expert_choice" (`ExpertChoiceRouter`): each expert takes its best tokens.
    - "sparsemixer" (`SparseMixerRouter`): experts are sampled in training.
    - "relu" (`ReLURouter`): all experts of a positive logit.
    - "hash" (`HashRouter`): experts by token id.
    - "capacity" (`CapacityRouter`): as "topk", dropping what is over an expert's capacity.

    Parameters and buffers:
        weight: [E, H]. bias: [E], with `bias=True`.
        expert_bias: [E] fp32 buffer, with `expert_bias=True` of kind="topk".

    Args:
        hidden_size: H.
        num_experts: E >= 1.
        top_k: K in [1, E]; for kind="expert_choice" the mean number of experts a token.
        kind: see above.
        bias: give the linear map a bias.
        jitter: in training, the router sees x times uniform numbers in [1 - jitter, 1 + jitter].
            Out of place: the experts, and the caller, keep x as it was.
        logits_dtype: compute the linear map in this type (torch.float32 for half models), also
            under autocast; None: in the type of x and weight (autocast's under autocast).
        apply_router_weight_on_input: `MoE` multiplies the experts' input by the weights instead of
            their output (Llama 4).
        device, dtype: of weight and bias.

    Initialisation: weight uniform in +-1/sqrt(H) as nn.Linear, bias and expert_bias 0.

    Raises:
        ValueError: a size, kind or combination that makes no sense, in one sentence.
    """

    kind: str = ""
    # How weights follow from logits. Constructors set what their kind leaves to the caller.
    score_func: str = "softmax"
    topk_first: bool = False
    renormalize: bool = False
    renormalize_p: float = 1.0
    routed_scaling_factor: float = 1.0
    # Groups of experts; one group is none.
    num_groups: int = 1
    num_topk_groups: int = 1
    group_score: str = "max"
    # Whether a choice in training draws random numbers. A forward that repeats a choice then draws
    # them too, so that what follows sees the same generator.
    draws_random_numbers: bool = False
    # Whether `split` may turn each expert into slices that are chosen together.
    splits_into_slices: ClassVar[bool] = False
    # Set for a while by `moe_ops.surgery.override_routing`.
    override: RoutingOverride | None = None

    expert_bias: Tensor | None
    tokens_per_expert: Tensor | None

    _kinds: ClassVar[dict[str, type[Router]]] = {}

    def __init_subclass__(cls, kind: str | None = None, **rest: Any) -> None:
        """`class MyRouter(Router, kind="mine")` makes `Router(..., kind="mine")` a MyRouter."""
        super().__init_subclass__(**rest)
        if kind is not None:
            cls.kind = kind
            Router._kinds[kind] = cls

    def __new__(cls, *args: Any, kind: str = "topk", **options: Any) -> Router:
        if cls is Router:
            check(kind in cls._kinds, f"kind must be one of {', '.join(cls._kinds)}, got {kind!r}")
            cls = cls._kinds[kind]
        return super().__new__(cls)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        kind: str | None = None,
        bias: bool = False,
        jitter: float = 0.0,
        logits_dtype: torch.dtype | None = None,
        apply_router_weight_on_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self._check_others(kind, others)
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

    @classmethod
    def like(
        cls, model: str, hidden_size: int, num_experts: int, top_k: int, **overrides: Any
    ) -> Router:
        """A router that behaves as the named model's does.

        Args:
            model: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, deepseek_v4,
                glm4_moe, granitemoe, gpt_oss, phimoe, jetmoe, dbrx or llama4 (the `model_type` of
                transformers).
            hidden_size, num_experts, top_k: sizes.
            overrides: any argument of Router; wins over the preset.

        Departures from the models: weights are never rounded to half types, jitter never touches
        the experts' input, experts of losing groups are excluded instead of scored 0, and
        deepseek_v2 starts without groups and scaling, which differ between its sizes.

        Raises:
            ValueError: an unknown name.
        """
        if model not in PRESETS:
            raise ValueError(
                f"Router.like: model must be one of {', '.join(PRESETS)}, got {model!r}."
            )
        return cls(hidden_size, num_experts, top_k, **{**PRESETS[model], **overrides})

    def _check_others(self, kind: str | None, others: dict[str, Any]) -> None:
        """Looks at arguments that this class does not have: those of other kinds are no error as
        long as they change nothing."""
        check(kind in (None, self.kind), f"kind must be {self.kind!r} or left out, got {kind!r}")
        kinds = [options_of(router) for router in Router._kinds.values()]
        for name, value in others.items():
            defaults = [options[name] for options in kinds if name in options]
            if not defaults:
                raise TypeError(f"{type(self).__name__}: there is no argument {name!r}.")
            if not isinstance(value, Tensor) and value in defaults:
                continue
            check(False, f"{name} must keep its default with kind={self.kind!r}, got {value!r}")

    def keep_expert_bias(self) -> None:
        """Adds the buffer `expert_bias` and the counter that `update_expert_bias` reads. For the
        constructors of routers that use the bias in their choice."""
        weight = self.weight
        self.expert_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=weight.device)
        # Not a buffer: DistributedDataParallel would overwrite it with the counts of rank 0.
        self.tokens_per_expert = torch.zeros(
            self.num_experts, dtype=torch.int64, device=weight.device
        )

    def reset_parameters(self) -> None:
        """Draws the initial values described above."""
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
        """The way of routing: each class has its own.

        Args:
            router_logits: [T, E] float, those of masked experts at the lowest finite number.
            expert_mask: [E] bool or None. Slots that go to masked experts are emptied afterwards.

        Returns:
            topk_weights [T, K'] fp32 (fp64 for fp64) and topk_ids [T, K'] int32; ties go to the
            smaller id.
        """
        raise NotImplementedError(f"{type(self).__name__} must override choose_experts.")

    def weights_of(self, router_logits: Tensor, topk_ids: Tensor) -> Tensor:
        """Weights of a choice that was made before: of `choose_experts` had it chosen these ids.

        Unless a class overrides it: the scores of the experts, divided by their norm with
        `renormalize`, times `routed_scaling_factor`.

        Args:
            router_logits: [T, E] fp32 or fp64.
            topk_ids: [T, K']; ids outside [0, E) must get weight 0 and not count otherwise.
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
            topk_ids: [T, K'] int32 or int64, a choice to keep: only its weights are computed, as
                `weights_at` says. K' is free.
            expert_mask: [E] bool, True where the expert may be used. Routing is as if the others
                did not exist (kind="expert_choice" keeps the capacity of all E); slots for which
                no usable expert is left, and given ids of masked experts, become -1 with weight 0.

        Returns:
            Routing(router_logits, topk_weights, topk_ids).
        """
        if topk_ids is not None:
            logits = self.logits(x)
            ids = drop_masked(topk_ids, expert_mask)
            return Routing(logits, self.weights_at(logits, ids, expert_mask=expert_mask), ids)
        routing = self._route_tokens(x, expert_mask)
        self.count(routing.topk_ids, routing.router_logits, expert_mask)
        return routing

    def _route_tokens(self, x: Tensor, expert_mask: Tensor | None) -> Routing:
        logits = self.logits(x)
        return Routing(logits, *self.route(logits, expert_mask=expert_mask))

    def logits(self, x: Tensor) -> Tensor:
        """router_logits [T, E] of x [T, H]: jitter (in training) and the linear map."""
        return router_logits(self._jittered(x), self.weight, self.bias, self.logits_dtype)

    def _jittered(self, x: Tensor) -> Tensor:
        if not self.training or self.jitter == 0:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)

    def route(
        self, router_logits: Tensor, *, expert_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """topk_weights and topk_ids of router_logits [T, E]; ties go to the smaller id."""
        if self.override is not None:
            return self.override.route(self, router_logits, expert_mask)
        logits = mask_logits(router_logits, expert_mask)
        weights, ids = self.choose_experts(logits, expert_mask)
        if expert_mask is not None:
            ids = drop_masked(ids, expert_mask)
            weights = weights.masked_fill(ids < 0, 0.0)
        return weights, ids

    def choose(self, router_logits: Tensor, *, expert_mask: Tensor | None = None) -> Tensor:
        """topk_ids [T, K] of router_logits [T, E], without a gradient; see `route`."""
        with torch.no_grad():
            return self.route(router_logits.detach(), expert_mask=expert_mask)[1]

    def weights_at(
        self, router_logits: Tensor, topk_ids: Tensor, *, expert_mask: Tensor | None = None
    ) -> Tensor:
        """Weights of a given choice: what `route` returns had it chosen `topk_ids`.

        Args:
            router_logits: [T, E].
            topk_ids: [T, K'] int32 or int64; ids outside [0, E) get weight 0 and do not count in a
                normalisation. Experts may repeat.
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
        """Adds the slots of a choice to `tokens_per_expert`, in training with an expert_bias.

        Does nothing while activations are recomputed, since the choice was counted before. (A
        compiled layer inside an eager checkpoint cannot tell and counts twice, which scales all
        loads alike and leaves `update_expert_bias` as it was.)
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
        """A new router with the rows of `ids`, in that order (repeats allowed).

        Args:
            ids: experts to keep, in [0, E).
            top_k: K of the result; None keeps it, which is an error when fewer experts are left.
            num_groups, num_topk_groups: groups of the result. None follows the old ones: each new
                group must then be experts of one old group, all groups of one size.

        Returns:
            A router with its own parameters (dtype, device and requires_grad kept).

        Raises:
            ValueError: ids out of range, top_k too large, or groups that no longer divide.
        """
        return surgery.select(self, ids, top_k, num_groups, num_topk_groups)

    def append(
        self,
        other: int | Router,
        *,
        init: str = "random",
        top_k: int | None = None,
        num_groups: int | None = None,
        num_topk_groups: int | None = None,
    ) -> Router:
        """A new router with rows added at the end.

        Args:
            other: the number of rows to add (at least 1), or a Router whose rows to add.
            init: of a number of rows: "random" (as in a fresh router, bias 0, expert_bias the mean
                of the old), "copy" (rows 0, 1, ... again), "mean" (the mean row).
            top_k, num_groups, num_topk_groups: of the result; None keeps them, which is an error
                for more than one group, since experts would move to other groups.

        Raises:
            ValueError: an unknown `init`, a number below 1, routers that do not fit together, or
                groups that no longer hold.
        """
        return surgery.append(self, other, init, top_k, num_groups, num_topk_groups)

    def split(
        self, ids: Sequence[int] | Tensor | None = None, factor: int = 2, *, mode: str = "slice"
    ) -> Router:
        """A new router for `Experts.split` with the same arguments: rows repeat in place.

        mode="slice" makes every slice of a chosen expert chosen with it: top_k grows by `factor`,
        routed_scaling_factor by what sharing the weight between the slices costs, and an
        expert_bias on softmax scores shrinks with the scores, so that `MoE.split` computes the same
        function. That needs kind="topk", all experts, and group_score="max" if there are groups.
        mode="copy" leaves top_k as it is; the copies tie, so the first one is chosen before the
        others until training tells them apart.

        Raises:
            ValueError: one of these conditions does not hold, or groups become uneven.
        """
        return surgery.split(self, ids, factor, mode)

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
        """A new router for `Experts.merge`: each row is the weighted mean of a group of rows.

        With mode="concat" top_k, routed_scaling_factor and expert_bias undo what `split` with
        mode="slice" did. The groups of group-limited routing follow as in `select`, by the first id
        of each.

        Raises:
            ValueError: sizes or ids that make no sense; top_k larger than the number of groups;
                mode="concat" with groups whose size does not divide top_k.
        """
        return surgery.merge_experts(
            self, groups, weights, mode, top_k, num_groups, num_topk_groups
        )

    def config(self) -> dict[str, Any]:
        """The keyword arguments that make a router like this one: all but device and dtype."""
        made = {
            name: getattr(self, name)
            for name in options_of(type(self))
            if name not in ("kind", "bias", "expert_bias", "device", "dtype")
        }
        made["bias"] = self.bias is not None
        if self.expert_bias is not None:
            made["expert_bias"] = True
        return made

    def with_rows(self, num_experts: int, top_k: int, **changes: Any) -> Router:
        """A router like this one with other sizes, whose rows are to be filled in. It is on the
        meta device, where initialisation draws no random numbers."""
        options = {**self.config(), **changes}
        return type(self)(self.hidden_size, num_experts, top_k, device="meta", **options)

    # ------------------------------------------------------------------------------ module hooks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            # Half precision would round away the small steps the bias is made of.
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

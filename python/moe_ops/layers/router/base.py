"""The router: from token to the experts it goes to and their weights.

Letters: T tokens, H hidden size, E experts, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops.numerics import is_batch_invariant
from moe_ops.ops import expert_choice_router, router_linear, topk_router, topp_router
from moe_ops.ops._linear_topk import linear_topk_router

from .bank import (
    as_groups,
    as_ids,
    check_split,
    merge_matrix,
    mix_rows,
    split_rows,
    take_rows,
    whole_rows,
)
from .invariant import linear
from .replay import in_backward
from .sparsemixer import sparsemixer
from .stats import count_tokens_per_expert

KINDS = ("topk", "topp", "expert_choice", "sparsemixer")

# How published models route, as the modelling code of transformers has it. Numbers that belong to
# one size of a model and not to its routing (number of groups of DeepSeek-V2, say) are left to the
# caller.
PRESETS: dict[str, dict[str, Any]] = {
    "mixtral": {"renormalize": True},
    "qwen2_moe": {},
    "qwen3_moe": {"renormalize": True},
    "olmoe": {},
    "deepseek_v2": {"logits_dtype": torch.float32},
    "deepseek_v3": {
        "score_func": "sigmoid",
        "renormalize": True,
        "routed_scaling_factor": 2.5,
        "expert_bias": True,
        "num_groups": 8,
        "num_topk_groups": 4,
        "group_score": "top2_sum",
        "logits_dtype": torch.float32,
    },
    "glm4_moe": {
        "score_func": "sigmoid",
        "renormalize": True,
        "expert_bias": True,
        "group_score": "top2_sum",
        "logits_dtype": torch.float32,
    },
    "granitemoe": {"topk_first": True},
    "gpt_oss": {"topk_first": True, "bias": True},
    "phimoe": {"kind": "sparsemixer", "sparsemixer_eps": 0.01},
    "jetmoe": {"topk_first": True},
    "dbrx": {"renormalize": True, "renormalize_p": 1.0},
    "llama4": {
        "score_func": "sigmoid",
        "topk_first": True,
        "apply_router_weight_on_input": True,
    },
}

# Constructor arguments that are attributes of the same name, number of experts aside.
_CONFIG = (
    "top_k",
    "kind",
    "score_func",
    "topk_first",
    "renormalize",
    "renormalize_p",
    "routed_scaling_factor",
    "num_groups",
    "num_topk_groups",
    "group_score",
    "jitter",
    "logits_dtype",
    "top_p",
    "max_k",
    "capacity_factor",
    "sparsemixer_eps",
    "apply_router_weight_on_input",
)


class RouterOutput(NamedTuple):
    """What a router says of T tokens.

    router_logits: [T, E] as computed, before any bias or mask; differentiable.
    topk_weights: [T, K] fp32 (fp64 for fp64 logits); differentiable.
    topk_ids: [T, K] int32; -1 marks a slot without an expert, whose weight is 0.

    K is `top_k`; `max_k` for kind="topp" and E for kind="expert_choice".
    """

    router_logits: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


class Router(nn.Module):
    """Linear router: logits = x W^T + b, then a choice of experts and their weights.

    Parameters and buffers:
        weight: [E, H]. bias: [E], with `bias=True`.
        expert_bias: [E] fp32 buffer, with `expert_bias=True`; added to the scores for the choice
            only, never to the weights. It stays fp32 through `.to(dtype)`, `.half()` and the like.

    Args:
        hidden_size: H.
        num_experts: E >= 1.
        top_k: K in [1, E]; for kind="expert_choice" the mean number of experts a token.
        kind: "topk"; "topp" (the smallest set of experts whose probabilities reach `top_p`, at most
            `max_k`); "expert_choice" (each expert takes its best ceil(capacity_factor * T * K / E)
            tokens: not causal, for encoders); "sparsemixer" (see `sparsemixer`).
        score_func: "softmax" over E or "sigmoid".
        topk_first: choose by logits and apply softmax to the K chosen only (sigmoid is unaffected,
            except that an expert_bias is then added to logits).
        renormalize: divide the K weights by their sum (p-norm with `renormalize_p`).
        renormalize_p: p >= 1 of the norm that `renormalize` divides by; 1 is the sum. DBRX has it.
        routed_scaling_factor: multiplies the weights at the end.
        expert_bias: keep the buffer described above, starting at 0. Count loads in training
            forwards, for `update_expert_bias`, in the attribute `tokens_per_expert` ([E] int64).
        num_groups, num_topk_groups: E is cut into `num_groups` groups of consecutive experts and
            only experts of the best `num_topk_groups` can be chosen.
        group_score: "max", or "top2_sum" (sum of the best two).
        bias: give the linear map a bias.
        jitter: in training, the router sees x times uniform numbers in [1 - jitter, 1 + jitter].
            Out of place: the experts, and the caller, keep x as it was.
        logits_dtype: compute the linear map in this type (torch.float32 for half models), also
            under autocast; None: in the type of x and weight (autocast's under autocast).
        top_p, max_k: of kind="topp"; `max_k` None is E.
        capacity_factor: of kind="expert_choice".
        sparsemixer_eps: of kind="sparsemixer".
        apply_router_weight_on_input: `MoE` multiplies the experts' input by the weights instead of
            their output (Llama 4).
        device, dtype: of weight and bias.

    Initialisation: weight uniform in +-1/sqrt(H) as nn.Linear, bias and expert_bias 0.

    Raises:
        ValueError: a size, kind or combination that makes no sense, in one sentence.
    """

    tokens_per_expert: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        kind: str = "topk",
        score_func: str = "softmax",
        topk_first: bool = False,
        renormalize: bool = False,
        renormalize_p: float = 1.0,
        routed_scaling_factor: float = 1.0,
        expert_bias: bool = False,
        num_groups: int = 1,
        num_topk_groups: int = 1,
        group_score: str = "max",
        bias: bool = False,
        jitter: float = 0.0,
        logits_dtype: torch.dtype | None = None,
        top_p: float = 0.9,
        max_k: int | None = None,
        capacity_factor: float = 1.0,
        sparsemixer_eps: float = 0.01,
        apply_router_weight_on_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.kind = kind
        self.score_func = score_func
        self.topk_first = topk_first
        self.renormalize = renormalize
        self.renormalize_p = renormalize_p
        self.routed_scaling_factor = routed_scaling_factor
        self.num_groups = num_groups
        self.num_topk_groups = num_topk_groups
        self.group_score = group_score
        self.jitter = jitter
        self.logits_dtype = logits_dtype
        self.top_p = top_p
        self.max_k = max_k
        self.capacity_factor = capacity_factor
        self.sparsemixer_eps = sparsemixer_eps
        self.apply_router_weight_on_input = apply_router_weight_on_input

        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(self.weight.new_empty(num_experts)) if bias else None
        self.expert_bias: Tensor | None
        self.register_buffer(
            "expert_bias",
            torch.zeros(num_experts, dtype=torch.float32, device=device) if expert_bias else None,
        )
        # Not a buffer: DistributedDataParallel would overwrite it with the counts of rank 0.
        self.tokens_per_expert = (
            torch.zeros(num_experts, dtype=torch.int64, device=device) if expert_bias else None
        )
        self._check(expert_bias)
        self.reset_parameters()

    @classmethod
    def like(
        cls, model: str, hidden_size: int, num_experts: int, top_k: int, **overrides: Any
    ) -> Router:
        """A router that behaves as the named model's does.

        Args:
            model: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, glm4_moe,
                granitemoe, gpt_oss, phimoe, jetmoe, dbrx or llama4 (the `model_type` of
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

    def _check(self, expert_bias: bool) -> None:
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"Router: {message}.")

        e = self.num_experts
        check(self.hidden_size >= 1, f"hidden_size must be at least 1, got {self.hidden_size}")
        check(e >= 1, f"num_experts must be at least 1, got {e}")
        check(1 <= self.top_k <= e, f"top_k must be in [1, num_experts = {e}], got {self.top_k}")
        check(self.kind in KINDS, f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        check(
            self.score_func in ("softmax", "sigmoid"),
            f"score_func must be 'softmax' or 'sigmoid', got {self.score_func!r}",
        )
        check(
            self.group_score in ("max", "top2_sum"),
            f"group_score must be 'max' or 'top2_sum', got {self.group_score!r}",
        )
        check(
            self.num_groups >= 1 and e % self.num_groups == 0,
            f"num_groups must divide num_experts = {e}, got {self.num_groups}",
        )
        check(
            1 <= self.num_topk_groups <= self.num_groups,
            f"num_topk_groups must be in [1, num_groups = {self.num_groups}], got "
            f"{self.num_topk_groups}",
        )
        check(
            self.group_score == "max" or self.num_groups == 1 or e >= 2 * self.num_groups,
            "group_score='top2_sum' needs at least 2 experts in a group, got "
            f"{e} experts in {self.num_groups} groups",
        )
        allowed = self.num_topk_groups * (e // self.num_groups)
        check(
            self.top_k <= allowed,
            f"top_k must be at most the {allowed} experts of {self.num_topk_groups} groups, got "
            f"{self.top_k}",
        )
        check(self.renormalize_p >= 1, f"renormalize_p must be >= 1, got {self.renormalize_p}")
        check(0 <= self.jitter < 1, f"jitter must be in [0, 1), got {self.jitter}")
        check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        check(
            self.max_k is None or 1 <= self.max_k <= e,
            f"max_k must be in [1, num_experts = {e}] or None, got {self.max_k}",
        )
        check(self.capacity_factor > 0, f"capacity_factor must be > 0, got {self.capacity_factor}")
        if self.kind != "topk":
            used = {
                "expert_bias": expert_bias,
                "num_groups": self.num_groups != 1,
                "topk_first": self.topk_first,
                "renormalize": self.renormalize and self.kind != "topp",
                "renormalize_p": self.renormalize_p != 1,
                "score_func": self.score_func != "softmax" and self.kind != "expert_choice",
                "routed_scaling_factor": self.routed_scaling_factor != 1
                and self.kind == "sparsemixer",
            }
            for name, is_used in used.items():
                check(not is_used, f"{name} must keep its default with kind={self.kind!r}, got set")

    def reset_parameters(self) -> None:
        """Draws the initial values described above."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    def forward(
        self, x: Tensor, *, topk_ids: Tensor | None = None, expert_mask: Tensor | None = None
    ) -> RouterOutput:
        """Routes T tokens.

        Args:
            x: [T, H] float.
            topk_ids: [T, K'] int32 or int64, a choice to keep: only its weights are computed, as
                `weights_at` says. K' is free.
            expert_mask: [E] bool, True where the expert may be used. Routing is as if the others
                did not exist (kind="expert_choice" keeps the capacity of all E); slots for which
                no usable expert is left, and given ids of masked experts, become -1 with weight 0.

        Returns:
            RouterOutput(router_logits, topk_weights, topk_ids).
        """
        if topk_ids is not None:
            logits = self.logits(x)
            ids = drop_masked(topk_ids, expert_mask)
            weights = self.weights_at(logits, ids, expert_mask=expert_mask)
            return RouterOutput(logits, weights, ids)
        if self._goes_at_once(x, expert_mask):
            logits, weights, ids = linear_topk_router(
                *self._operands(self._jittered(x)), *self._topk_options()
            )
        else:
            logits = self.logits(x)
            weights, ids = self.route(logits, expert_mask=expert_mask)
        self.count(ids)
        return RouterOutput(logits, weights, ids)

    def logits(self, x: Tensor) -> Tensor:
        """router_logits [T, E] of x [T, H]: jitter (in training) and the linear map."""
        x = self._jittered(x)
        if self._has_few_columns(x):
            x, weight, bias, logits_dtype = self._operands(x)
            return router_linear(x, weight, bias, logits_dtype=logits_dtype)
        device_type = x.device.type
        autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
        if self.logits_dtype is None:
            if not autocast:
                x = x.to(self.weight.dtype)
            return linear(x, self.weight, self.bias)
        x, weight = x.to(self.logits_dtype), self.weight.to(self.logits_dtype)
        bias = None if self.bias is None else self.bias.to(self.logits_dtype)
        if not autocast:
            return linear(x, weight, bias)
        with torch.autocast(device_type, enabled=False):
            return linear(x, weight, bias)

    def _jittered(self, x: Tensor) -> Tensor:
        if not self.training or self.jitter == 0:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)

    def _has_few_columns(self, x: Tensor) -> bool:
        """Whether `router_linear` is faster than `linear`; compiled code keeps the latter."""
        weight = self.weight
        e, h = weight.shape
        return (
            e <= 8
            and (e <= 4 or (h >= 256 and weight.element_size() == 2))
            and not torch.compiler.is_compiling()
            and x.device.type == weight.device.type == "cpu"
            and x.dim() == 2
            # Below that, F.linear is done before Python has called the op.
            and x.numel() >= 2**15
            and self.logits_dtype in (None, torch.float32, weight.dtype)
            and not torch.is_autocast_enabled("cpu")
            and not is_batch_invariant()
        )

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
        """Arguments of `router_linear`. Half x and weights make float32 logits as they are."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        dtype = self.logits_dtype
        if dtype is not None and (x.dtype != weight.dtype or weight.dtype == torch.float64):
            weight = weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return x.to(weight.dtype), weight, bias, dtype

    def _goes_at_once(self, x: Tensor, expert_mask: Tensor | None) -> bool:
        """Whether the linear map and the choice can be one node of autograd."""
        return (
            self.kind == "topk"
            and expert_mask is None
            and not (self.renormalize and self.renormalize_p != 1)
            and type(self).logits is Router.logits
            and type(self).route is Router.route
            and self._has_few_columns(x)
        )

    def _topk_options(self) -> tuple[Any, ...]:
        return (
            self.top_k,
            self.score_func,
            self.topk_first,
            self.renormalize,
            self.routed_scaling_factor,
            self.expert_bias,
            self.num_groups,
            self.num_topk_groups,
            self.group_score,
        )

    def route(
        self, router_logits: Tensor, *, expert_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """topk_weights and topk_ids of router_logits [T, E]; ties go to the smaller id."""
        logits = _mask_logits(router_logits, expert_mask)
        num_tokens = logits.shape[0]
        if self.kind == "topk":
            own_norm = self.renormalize and self.renormalize_p != 1
            weights, ids = topk_router(
                logits,
                self.top_k,
                score_func=self.score_func,
                topk_first=self.topk_first,
                renormalize=self.renormalize and not own_norm,
                routed_scaling_factor=1.0 if own_norm else self.routed_scaling_factor,
                expert_bias=self._choice_bias(expert_mask),
                num_groups=self.num_groups,
                num_topk_groups=self.num_topk_groups,
                group_score=self.group_score,
            )
            if own_norm:
                weights = self._normalize(weights) * self.routed_scaling_factor
        elif self.kind == "topp":
            weights, ids = topp_router(
                logits,
                self.top_p,
                self.max_k,
                renormalize=self.renormalize,
                routed_scaling_factor=self.routed_scaling_factor,
            )
        elif self.kind == "expert_choice":
            share = self.capacity_factor * num_tokens * self.top_k / self.num_experts
            capacity = max(1, math.ceil(share))
            weights, ids = expert_choice_router(
                logits,
                capacity,
                score_func=self.score_func,
                routed_scaling_factor=self.routed_scaling_factor,
            )
        else:
            weights, ids = sparsemixer(
                logits, self.top_k, eps=self.sparsemixer_eps, training=self.training
            )
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
        logits = _mask_logits(logits, expert_mask)
        logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        if self.kind == "sparsemixer":
            return sparsemixer(
                logits,
                topk_ids.shape[1],
                eps=self.sparsemixer_eps,
                training=self.training,
                topk_ids=topk_ids,
            )[0]
        ids = topk_ids.long()
        valid = (ids >= 0) & (ids < self.num_experts)
        ids = torch.where(valid, ids, 0)
        if self.score_func == "sigmoid":
            weights = logits.gather(1, ids).sigmoid()
        elif self.topk_first:
            chosen = logits.gather(1, ids).masked_fill(~valid, torch.finfo(logits.dtype).min)
            weights = chosen.softmax(-1)
        else:
            weights = logits.softmax(-1).gather(1, ids)
        weights = weights.masked_fill(~valid, 0.0)
        if self.renormalize:
            weights = self._normalize(weights)
        return weights * self.routed_scaling_factor

    def count(self, topk_ids: Tensor) -> None:
        """Adds the slots of a choice to `tokens_per_expert`, in training with an expert_bias.

        Does nothing while activations are recomputed, since the choice was counted before. (A
        compiled layer inside an eager checkpoint cannot tell and counts twice, which scales all
        loads alike and leaves `update_expert_bias` as it was.)
        """
        if self.training and self.tokens_per_expert is not None and not in_backward():
            with torch.no_grad():
                self.tokens_per_expert.add_(count_tokens_per_expert(topk_ids, self.num_experts))

    def _normalize(self, weights: Tensor) -> Tensor:
        if self.renormalize_p == 1:
            return weights / (weights.sum(-1, keepdim=True) + 1e-20)
        norm = torch.linalg.vector_norm(weights, self.renormalize_p, dim=-1, keepdim=True)
        return weights / (norm + 1e-20)

    def _choice_bias(self, expert_mask: Tensor | None) -> Tensor | None:
        """The bias of the choice; a mask goes into it, lest masked experts win by their bias."""
        bias = self.expert_bias
        if expert_mask is None:
            return bias
        if bias is None:
            # Logits rank the experts alone, unless groups are scored by a sum of scores.
            if self.num_groups == 1 or self.group_score == "max":
                return None
            bias = torch.zeros(self.num_experts, dtype=torch.float32, device=expert_mask.device)
        return bias.masked_fill(~expert_mask, torch.finfo(torch.float32).min)

    # ------------------------------------------------------------------------- bank operations

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
        index = as_ids("Router.select", ids, self.num_experts)
        return self._rebuild(
            {name: take_rows(t, index) for name, t in self._row_tensors().items()},
            top_k=top_k,
            **self._follow_groups(index, num_groups, num_topk_groups),
        )

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
        if self.num_groups > 1 and num_groups is None:
            raise ValueError(
                "Router.append: num_groups must be given for a router with "
                f"{self.num_groups} groups, got None."
            )
        old = self._row_tensors()
        if isinstance(other, Router):
            new = other._row_tensors()
            if other.hidden_size != self.hidden_size or new.keys() != old.keys():
                raise ValueError(
                    "Router.append: other must have the hidden_size, bias and expert_bias of "
                    f"{self}, got {other}."
                )
        else:
            new = self._fresh_rows(other, init)
        return self._rebuild(
            {name: torch.cat([t, new[name].to(t)]) for name, t in old.items()},
            top_k=top_k,
            num_groups=num_groups,
            num_topk_groups=num_topk_groups,
        )

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
        index = as_ids("Router.split", ids, self.num_experts)
        check_split("Router.split", factor, mode)
        partial = len(index) < self.num_experts
        if mode == "slice":
            grouped = self.num_groups > 1 and self.group_score != "max"
            if self.kind != "topk" or partial or grouped:
                raise ValueError(
                    "Router.split: mode='slice' needs kind='topk', all experts, and no top2_sum "
                    f"groups, got kind={self.kind!r}, {len(index)} of {self.num_experts} experts "
                    f"and {self.num_groups} groups with group_score={self.group_score!r}."
                )
        if partial and self.num_groups > 1:
            raise ValueError(
                "Router.split: ids must be all experts of a router with "
                f"{self.num_groups} groups, got {len(index)} of {self.num_experts}."
            )
        rows = split_rows(index, factor, self.num_experts)
        tensors = {name: take_rows(t, rows) for name, t in self._row_tensors().items()}
        if mode == "copy":
            return self._rebuild(tensors)
        return self._rebuild(
            self._scale_bias(tensors, 1.0 / factor),
            top_k=self.top_k * factor,
            routed_scaling_factor=self.routed_scaling_factor * self._slice_gain(factor),
        )

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
        members = as_groups("Router.merge", groups, self.num_experts, mode)
        matrix = merge_matrix("Router.merge", members, weights, self.num_experts)
        tensors = {name: mix_rows(matrix, t) for name, t in self._row_tensors().items()}
        changes = self._follow_groups([m[0] for m in members], num_groups, num_topk_groups)
        if mode == "concat":
            size = len(members[0])
            if self.kind != "topk" or self.top_k % size:
                raise ValueError(
                    "Router.merge: mode='concat' needs kind='topk' and groups whose size divides "
                    f"top_k = {self.top_k}, got kind={self.kind!r} and size {size}."
                )
            tensors = self._scale_bias(tensors, float(size))
            changes["routed_scaling_factor"] = self.routed_scaling_factor / self._slice_gain(size)
            top_k = self.top_k // size if top_k is None else top_k
        return self._rebuild(tensors, top_k=top_k, **changes)

    def _slice_gain(self, factor: int) -> float:
        """By how much weights shrink when each chosen expert becomes `factor` equal ones."""
        if self.renormalize:
            return factor ** (1.0 / self.renormalize_p)
        # A sigmoid does not see the other experts; a softmax shares its mass among the slices.
        return 1.0 if self.score_func == "sigmoid" else float(factor)

    def _scale_bias(self, tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
        """The bias follows softmax scores, which shrink with the number of experts."""
        if "expert_bias" in tensors and self.score_func == "softmax" and not self.topk_first:
            tensors["expert_bias"] = tensors["expert_bias"] * factor
        return tensors

    def _follow_groups(
        self, index: list[int], num_groups: int | None, num_topk_groups: int | None
    ) -> dict[str, Any]:
        """Groups of a router of the old experts `index`, which must be equal runs of old groups."""
        if self.num_groups == 1 or num_groups is not None:
            return {"num_groups": num_groups, "num_topk_groups": num_topk_groups}
        size = self.num_experts // self.num_groups
        old = [e // size for e in index]
        starts = [i for i in range(len(old)) if i == 0 or old[i] != old[i - 1]]
        lengths = {b - a for a, b in zip(starts, [*starts[1:], len(old)], strict=True)}
        if len(lengths) != 1 or len({old[i] for i in starts}) != len(starts):
            raise ValueError(
                "Router: the experts kept must be equal, unbroken runs of the old groups (or "
                f"num_groups must be given), got experts {index} of groups of {size}."
            )
        return {"num_groups": len(starts), "num_topk_groups": num_topk_groups}

    def _row_tensors(self) -> dict[str, Tensor]:
        tensors = {"weight": self.weight, "bias": self.bias, "expert_bias": self.expert_bias}
        return whole_rows("Router", {name: t for name, t in tensors.items() if t is not None})

    def _fresh_rows(self, num: int, init: str) -> dict[str, Tensor]:
        if num < 1:
            raise ValueError(f"Router.append: the number of experts must be >= 1, got {num}.")
        old = self._row_tensors()
        if init == "copy":
            rows = [i % self.num_experts for i in range(num)]
            return {name: take_rows(t, rows) for name, t in old.items()}
        if init not in ("random", "mean"):
            raise ValueError(
                f"Router.append: init must be 'random', 'copy' or 'mean', got {init!r}."
            )
        new = {name: t.mean(0, keepdim=True).expand(num, *t.shape[1:]) for name, t in old.items()}
        if init == "random":
            bound = self.weight.shape[1] ** -0.5
            new["weight"] = torch.empty_like(new["weight"].contiguous()).uniform_(-bound, bound)
            if "bias" in new:
                new["bias"] = torch.zeros_like(new["bias"])
        return new

    def _rebuild(self, tensors: dict[str, Tensor], **changes: Any) -> Router:
        """A router like this one with other rows; changes that are None are none."""
        changes = {name: value for name, value in changes.items() if value is not None}
        num_experts = tensors["weight"].shape[0]
        config = {name: getattr(self, name) for name in _CONFIG}
        if self.max_k is not None:
            config["max_k"] = min(self.max_k, num_experts)
        config |= changes
        if "num_topk_groups" not in changes:
            config["num_topk_groups"] = min(config["num_topk_groups"], config["num_groups"])
        result = self._blank(num_experts, **config)
        for name in ("weight", "bias"):
            old = getattr(self, name)
            if old is not None:
                new = tensors[name].to(old).clone()
                setattr(result, name, nn.Parameter(new, requires_grad=old.requires_grad))
        if self.expert_bias is not None:
            result.expert_bias = tensors["expert_bias"].to(self.expert_bias).clone()
            result.tokens_per_expert = torch.zeros(
                num_experts, dtype=torch.int64, device=self.expert_bias.device
            )
        return result.train(self.training)

    def _blank(self, num_experts: int, **config: Any) -> Router:
        """A router of this class with other rows, on the meta device, where initialisation draws no
        random numbers; what does not belong to a row is copied from this one."""
        return Router(
            self.hidden_size,
            num_experts,
            bias=self.bias is not None,
            expert_bias=self.expert_bias is not None,
            device="meta",
            **config,
        )

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
            device = self.weight.device
            if self.tokens_per_expert.device != device:
                on_meta = "meta" in (self.tokens_per_expert.device.type, device.type)
                self.tokens_per_expert = (
                    torch.zeros_like(self.tokens_per_expert, device=device)
                    if on_meta
                    else self.tokens_per_expert.to(device)
                )
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


def drop_masked(topk_ids: Tensor, expert_mask: Tensor | None) -> Tensor:
    """The ids, with -1 for experts that the mask [E] does not allow and for ids outside [0, E)."""
    if expert_mask is None:
        return topk_ids
    num_experts = expert_mask.shape[0]
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    allowed = expert_mask[torch.where(valid, topk_ids, 0).long()]
    return topk_ids.masked_fill(~(valid & allowed), -1)


def _mask_logits(router_logits: Tensor, expert_mask: Tensor | None) -> Tensor:
    if expert_mask is None:
        return router_logits
    num_experts = router_logits.shape[-1]
    if expert_mask.dtype != torch.bool or expert_mask.shape != (num_experts,):
        raise ValueError(
            f"Router: expert_mask must be bool [{num_experts}], got "
            f"{str(expert_mask.dtype).removeprefix('torch.')} of shape {list(expert_mask.shape)}."
        )
    # The lowest finite number, not -inf: with every expert masked, softmax and its gradient stay
    # finite, and the weights are zeroed afterwards.
    return router_logits.masked_fill(~expert_mask, torch.finfo(router_logits.dtype).min)

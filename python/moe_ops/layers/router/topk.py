"""Top-k routing.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.scores import router_scores
from moe_ops.ops import topk_router
from moe_ops.ops._linear_topk import linear_topk_router

from ..functional import router_linear_operands, use_router_linear
from ..recompute import in_backward
from ..routing import Routing, mask_logits
from ..stats import moved_counts
from .base import Router
from .options import check, check_score_func
from .quantile import BOUNDED_SCORES, count_required_bias


class TopKRouter(Router, kind="topk"):
    """Router that selects the K experts with the best scores per token, see `moe_ops.topk_router`.

    Args:
        score_func: score function, see `moe_ops.topk_router`.
        topk_first: select by logits and apply softmax to the K selected logits only (other score
            functions are unaffected, except that an expert_bias is added to logits).
        renormalize: divide the K weights by their sum (p-norm with `renormalize_p`).
        renormalize_p: p >= 1 of the norm that `renormalize` divides by; 1 is the sum (DBRX).
        routed_scaling_factor: multiplies the weights at the end.
        expert_bias: adds the buffer expert_bias [E], fp32, initially 0. It is added to the scores
            for top-k selection only, never to the weights, and stays fp32 through `.to(dtype)` and
            `.half()`. Training forwards count loads for `update_expert_bias` in the attribute
            `tokens_per_expert` ([E] int64).
        bias_bins: number of bins of the histogram `bias_histogram` ([E, bias_bins] int64), which
            training forwards fill and `update_expert_bias(rule="quantile")` reads; 0 disables it.
            Kimi K3 uses 1000. The bins cover [min bias - 1, max bias + 1]; softmax over many
            experts, with small scores, needs more bins. Requires expert_bias, scores in [0, 1], and
            no groups.
        num_groups, num_topk_groups: `num_groups` groups of consecutive experts, of which only the
            best `num_topk_groups` are eligible.
        group_score: "max", or "top2_sum" (sum of the best two).
        hidden_size, num_experts, top_k, options: see `Router`.
    """

    splits_into_slices = True

    bias_bins: int = 0
    bias_histogram: Tensor | None = None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_func: str = "softmax",
        topk_first: bool = False,
        renormalize: bool = False,
        renormalize_p: float = 1.0,
        routed_scaling_factor: float = 1.0,
        expert_bias: bool = False,
        bias_bins: int = 0,
        num_groups: int = 1,
        num_topk_groups: int = 1,
        group_score: str = "max",
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.score_func = score_func
        self.topk_first = topk_first
        self.renormalize = renormalize
        self.renormalize_p = renormalize_p
        self.routed_scaling_factor = routed_scaling_factor
        self.num_groups = num_groups
        self.num_topk_groups = num_topk_groups
        self.group_score = group_score
        self.bias_bins = bias_bins
        self._check_options()
        self._check_bias_bins(expert_bias)
        if expert_bias:
            self.keep_expert_bias()
        if bias_bins:
            # Not a buffer, like tokens_per_expert.
            self.bias_histogram = torch.zeros(
                num_experts, bias_bins, dtype=torch.int64, device=self.weight.device
            )

    def _check_options(self) -> None:
        e, groups, topk_groups = self.num_experts, self.num_groups, self.num_topk_groups
        check_score_func(self.score_func)
        check(self.renormalize_p >= 1, f"renormalize_p must be >= 1, got {self.renormalize_p}")
        check(
            self.group_score in ("max", "top2_sum"),
            f"group_score must be 'max' or 'top2_sum', got {self.group_score!r}",
        )
        check(
            groups >= 1 and e % groups == 0,
            f"num_groups must divide num_experts = {e}, got {groups}",
        )
        check(
            1 <= topk_groups <= groups,
            f"num_topk_groups must be in [1, num_groups = {groups}], got {topk_groups}",
        )
        check(
            self.group_score == "max" or groups == 1 or e >= 2 * groups,
            f"group_score='top2_sum' needs at least 2 experts in a group, got {e} experts in "
            f"{groups} groups",
        )
        allowed = topk_groups * (e // groups)
        check(
            self.top_k <= allowed,
            f"top_k must be at most the {allowed} experts of {topk_groups} groups, got "
            f"{self.top_k}",
        )

    def _check_bias_bins(self, expert_bias: bool) -> None:
        check(self.bias_bins >= 0, f"bias_bins must be at least 0, got {self.bias_bins}")
        if not self.bias_bins:
            return
        check(expert_bias, f"bias_bins must come with expert_bias=True, got {self.bias_bins}")
        check(
            self.score_func in BOUNDED_SCORES and not self.topk_first,
            f"bias_bins must come with scores in [0, 1] ({' or '.join(BOUNDED_SCORES)}, without "
            f"topk_first), got {self.score_func!r}{' with topk_first' * self.topk_first}",
        )
        check(
            self.num_topk_groups == self.num_groups,
            f"bias_bins must come with all groups allowed, got {self.num_topk_groups} of "
            f"{self.num_groups} groups",
        )

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # The op divides by the sum only; other norms are applied afterwards.
        own_norm = self.renormalize and self.renormalize_p != 1
        weights, ids = topk_router(
            router_logits,
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
        return weights, ids

    def _choice_bias(self, expert_mask: Tensor | None) -> Tensor | None:
        """Returns the selection bias, which includes the mask so that masked experts cannot win by
        their bias."""
        bias = self.expert_bias
        if expert_mask is None:
            return bias
        if bias is None:
            # Logits alone rank the experts, unless groups are scored by a sum of scores.
            if self.num_groups == 1 or self.group_score == "max":
                return None
            bias = torch.zeros(self.num_experts, dtype=torch.float32, device=expert_mask.device)
        return bias.masked_fill(~expert_mask, torch.finfo(torch.float32).min)

    def count(
        self,
        topk_ids: Tensor,
        router_logits: Tensor | None = None,
        expert_mask: Tensor | None = None,
    ) -> None:
        """Counts like `Router.count`; with `bias_bins`, also fills `bias_histogram`."""
        super().count(topk_ids, router_logits, expert_mask)
        histogram, bias = self.bias_histogram, self.expert_bias
        if histogram is None or bias is None or router_logits is None:
            return
        if self.top_k >= self.num_experts:
            return  # All experts are selected: there is nothing to balance.
        if self.training and not in_backward():
            with torch.no_grad():
                scores = router_scores(mask_logits(router_logits, expert_mask), self.score_func)
                count_required_bias(histogram, scores, bias, self.top_k, expert_mask)

    def _route_tokens(self, x: Tensor, expert_mask: Tensor | None) -> Routing:
        if not self._can_fuse_linear_topk(x, expert_mask):
            return super()._route_tokens(x, expert_mask)
        operands = router_linear_operands(
            self._jittered(x), self.weight, self.bias, self.logits_dtype
        )
        return Routing(
            *linear_topk_router(
                *operands,
                self.logits_dtype,
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
        )

    def _can_fuse_linear_topk(self, x: Tensor, expert_mask: Tensor | None) -> bool:
        """Returns whether the linear map and the selection can be one autograd node."""
        cls = type(self)
        return (
            use_router_linear(x, self.weight, self.logits_dtype)
            and expert_mask is None
            and self.override is None
            and not (self.renormalize and self.renormalize_p != 1)
            and cls.logits is Router.logits
            and cls.route is Router.route
            and cls.choose_experts is TopKRouter.choose_experts
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        super()._apply(fn, recurse)
        if self.bias_histogram is not None:
            self.bias_histogram = moved_counts(self.bias_histogram, self.weight.device)
        return self

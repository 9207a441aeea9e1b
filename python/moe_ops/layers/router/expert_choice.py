"""Expert-choice routing: experts select tokens.

Letters: T tokens, E experts, K mean experts per token.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from moe_ops.ops import expert_choice_router

from .base import Router
from .options import check, check_score_func


class ExpertChoiceRouter(Router, kind="expert_choice"):
    """Router in which each expert takes its best ceil(capacity_factor * T * K / E) tokens (at least
    one), see `moe_ops.expert_choice_router`. It is not causal: a token's experts depend on all
    other tokens, which suits encoders.

    Args:
        capacity_factor: greater than 0.
        score_func: see `TopKRouter`.
        routed_scaling_factor: multiplies the weights at the end.
        hidden_size, num_experts, top_k, options: see `Router`; top_k is the mean number of experts
            per token.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        capacity_factor: float = 1.0,
        score_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        check(capacity_factor > 0, f"capacity_factor must be > 0, got {capacity_factor}")
        check_score_func(score_func)
        self.capacity_factor = capacity_factor
        self.score_func = score_func
        self.routed_scaling_factor = routed_scaling_factor

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        share = self.capacity_factor * router_logits.shape[0] * self.top_k / self.num_experts
        return expert_choice_router(
            router_logits,
            max(1, math.ceil(share)),
            score_func=self.score_func,
            routed_scaling_factor=self.routed_scaling_factor,
        )

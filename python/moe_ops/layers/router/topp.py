"""Top-p routing: the smallest set of experts whose probabilities reach a threshold.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_ops.ops import topp_router

from .base import Router
from .options import check


class TopPRouter(Router, kind="topp"):
    """Router that selects the fewest experts whose probabilities add up to `top_p`, see
    `moe_ops.topp_router`.

    Args:
        top_p: in (0, 1].
        max_k: maximum number of experts per token, and the number of slots; None is E.
        renormalize: divide the weights of a token by their sum.
        routed_scaling_factor: multiplies the weights at the end.
        hidden_size, num_experts, top_k, options: see `Router`; top_k is not used.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        top_p: float = 0.9,
        max_k: int | None = None,
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        check(0 < top_p <= 1, f"top_p must be in (0, 1], got {top_p}")
        check(
            max_k is None or 1 <= max_k <= num_experts,
            f"max_k must be in [1, num_experts = {num_experts}] or None, got {max_k}",
        )
        self.top_p = top_p
        self.max_k = max_k
        self.renormalize = renormalize
        self.routed_scaling_factor = routed_scaling_factor

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return topp_router(
            router_logits,
            self.top_p,
            self.max_k,
            renormalize=self.renormalize,
            routed_scaling_factor=self.routed_scaling_factor,
        )

    def with_rows(self, num_experts: int, top_k: int, **changes: Any) -> Router:
        if self.max_k is not None:
            changes["max_k"] = min(self.max_k, num_experts)
        return super().with_rows(num_experts, top_k, **changes)

"""ReLU routing: a differentiable router with a variable number of experts per token, and its
sparsity loss.

Letters: T tokens, E experts, K mean experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..routing import valid_ids
from ..stats import count_tokens_per_expert
from .base import Router
from .options import check


class ReLURouter(Router, kind="relu"):
    """Router whose weights are ReLU(logits); a token uses all experts with a positive weight.

    The output is continuous in the logits, because an expert enters with weight 0. The number of
    experts per token is learned; `relu_router_loss`, times the coefficient that `L1Coefficient`
    adapts, drives its mean to K. Set `bias=True` for centered inputs: without a bias, half of them
    have a positive logit for any expert, however small its weights.

    Args:
        max_k: maximum number of experts per token, K' of the routing; None is E. If more weights
            are positive, the largest are kept and the output is no longer continuous.
        routed_scaling_factor: multiplies the weights.
        hidden_size, num_experts, top_k, options: see `Router`; top_k is the target number of
            experts per token, which only `relu_router_loss` uses.

    Source: Wang et al. 2024 (ReMoE, arXiv 2412.14711).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        max_k: int | None = None,
        routed_scaling_factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        check(
            max_k is None or 1 <= max_k <= num_experts,
            f"max_k must be in [1, num_experts = {num_experts}] or None, got {max_k}",
        )
        self.max_k = max_k
        self.routed_scaling_factor = routed_scaling_factor

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        double = router_logits.dtype == torch.float64
        weights = router_logits.to(torch.float64 if double else torch.float32).relu()
        if self.max_k is None or self.max_k == self.num_experts:
            ids = torch.arange(self.num_experts, dtype=torch.int32, device=weights.device)
            ids = ids.expand(weights.shape)
        else:
            # Stable: ties go to the smaller id.
            order = weights.detach().argsort(dim=-1, descending=True, stable=True)
            order = order[:, : self.max_k]
            weights, ids = weights.gather(1, order), order.to(torch.int32)
        return weights * self.routed_scaling_factor, ids.masked_fill(weights <= 0, -1)

    def weights_of(self, router_logits: Tensor, topk_ids: Tensor) -> Tensor:
        valid, ids = valid_ids(topk_ids, self.num_experts)
        weights = router_logits.gather(1, ids).relu().masked_fill(~valid, 0.0)
        return weights * self.routed_scaling_factor

    def with_rows(self, num_experts: int, top_k: int, **changes: Any) -> Router:
        if self.max_k is not None:
            changes["max_k"] = min(self.max_k, num_experts)
        return super().with_rows(num_experts, top_k, **changes)


def relu_router_loss(
    router_logits: Tensor,
    top_k: int,
    *,
    balance: bool = True,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Computes the L1 norm of a `ReLURouter`'s weights: L = mean over tokens of sum_e f[e]
    ReLU(logits[t, e]).

    f[e] = E / K * (fraction of tokens that use expert e) penalizes frequent experts more. It is 1
    at balance with K experts per token, and gradients treat it as a constant.

    Args:
        router_logits: [..., E] of one layer; average over the layers of a model.
        top_k: K.
        balance: False omits f[e]: the plain L1 norm.
        token_mask: bool, one element per token, True if the token counts.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64), not multiplied by a coefficient; 0 without
        tokens.

    Raises:
        ValueError: `token_mask` does not have one element per token.

    Source: Wang et al. 2024 (ReMoE, arXiv 2412.14711), the load balancing refined L1
    regularization.
    """
    double = router_logits.dtype == torch.float64
    num_experts = router_logits.shape[-1]
    logits = router_logits.reshape(-1, num_experts)
    logits = logits.to(torch.float64 if double else torch.float32)
    num_tokens: Any = max(logits.shape[0], 1)
    if token_mask is not None:
        if token_mask.numel() != logits.shape[0]:
            raise ValueError(
                f"relu_router_loss: token_mask must have {logits.shape[0]} elements, one a token, "
                f"got shape {list(token_mask.shape)}."
            )
        mask = token_mask.reshape(-1, 1).bool()
        logits, num_tokens = logits.masked_fill(~mask, 0.0), mask.sum().clamp(min=1)
    weights = logits.relu()
    if balance:
        share = (weights.detach() > 0).sum(0).to(weights.dtype) / num_tokens
        weights = weights * (num_experts / top_k * share)
    return weights.sum() / num_tokens


class L1Coefficient:
    """Coefficient of `relu_router_loss`, adapted until the routers reach the target sparsity.

    After each step, value becomes value * factor if the sparsity is below the target 1 - K / E and
    value / factor if it is above. The sparsity is the fraction of (token, expert) pairs that are
    not routed, over all layers.

    Example:
        coefficient = L1Coefficient(num_experts=64, top_k=8)
        loss = task_loss + coefficient.value * mean of relu_router_loss over the layers
        ...
        optimizer.step()
        coefficient.update(routing.topk_ids for routing in routings)

    Args:
        num_experts, top_k: E and K.
        initial: first value, greater than 0.
        factor: greater than 1.

    Raises:
        ValueError: a value out of range.

    Source: Wang et al. 2024 (ReMoE, arXiv 2412.14711): initial 1e-8 and factor 1.2.
    """

    def __init__(
        self, num_experts: int, top_k: int, *, initial: float = 1e-8, factor: float = 1.2
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"L1Coefficient: top_k must be in [1, {num_experts}], got {top_k}.")
        if not initial > 0 or not factor > 1:
            raise ValueError(
                f"L1Coefficient: initial must be > 0 and factor > 1, got {initial} and {factor}."
            )
        self.num_experts = num_experts
        self.target_sparsity = 1 - top_k / num_experts
        self.factor = factor
        self.value = initial

    def update(self, topk_ids: Iterable[Tensor], *, group: Any = None) -> float:
        """Adapts `value` (one device sync) and returns the sparsity.

        Args:
            topk_ids: one [..., K'] tensor per layer; ids outside [0, E) are empty slots.
            group: process group; counts are summed over its ranks if torch.distributed is
                initialized, so that all ranks have one value.
        """
        ids = list(topk_ids)
        if not ids:
            raise ValueError("L1Coefficient: topk_ids must hold a layer, got none.")
        used = torch.stack([count_tokens_per_expert(i, self.num_experts).sum() for i in ids]).sum()
        pairs = sum(i.shape[:-1].numel() for i in ids) * self.num_experts
        both = torch.stack([used, torch.full_like(used, pairs)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(both, group=group)
        num_used, num_pairs = both.tolist()
        sparsity = 1 - num_used / num_pairs if num_pairs else self.target_sparsity
        if sparsity < self.target_sparsity:
            self.value *= self.factor
        elif sparsity > self.target_sparsity:
            self.value /= self.factor
        return sparsity

    def state_dict(self) -> dict[str, float]:
        """Returns the state for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Loads the result of `state_dict`."""
        self.value = state["value"]

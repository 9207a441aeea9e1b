"""SparseMixer-v2: selects experts one after another and estimates the gradient of sampling.

Letters: T tokens, E experts, K picks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Router


class SparseMixerRouter(Router, kind="sparsemixer"):
    """Router that makes K sequential picks, sampled in training; see `sparsemixer`.

    Args:
        sparsemixer_eps: half the relative distance from the largest logit within which experts
            compete.
        hidden_size, num_experts, top_k, options: see `Router`.
    """

    draws_random_numbers = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        sparsemixer_eps: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.sparsemixer_eps = sparsemixer_eps

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return sparsemixer(
            router_logits, self.top_k, eps=self.sparsemixer_eps, training=self.training
        )

    def weights_of(self, router_logits: Tensor, topk_ids: Tensor) -> Tensor:
        return sparsemixer(
            router_logits,
            topk_ids.shape[1],
            eps=self.sparsemixer_eps,
            training=self.training,
            topk_ids=topk_ids,
        )[0]


def sparsemixer(
    router_logits: Tensor,
    top_k: int = 2,
    *,
    eps: float = 0.01,
    training: bool = False,
    topk_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the routing weights and ids of SparseMixer-v2.

    Each pick sees the experts not yet picked whose logit s satisfies (m - s) / max(|s|, m) <=
    2 * eps, with m the largest logit left. The weight of a pick is its probability under a softmax
    over those experts, so the K weights are independent and may sum to more than 1.

    In evaluation the pick is the largest logit. In training it is drawn by the Gumbel trick, and
    the weight is further multiplied by 1/3 with probability 3/4 when the draw is not the largest:
    Heun's third-order estimate of the gradient through the draw. The gradient is that of the
    probability alone, without this factor.

    Args:
        router_logits: [T, E] float, E >= K. Half types are computed in fp32.
        top_k: K >= 1; 2 in the paper and in Phi-3.5-MoE.
        eps: half the relative distance from the largest logit within which experts compete.
        training: draws E exponential and one uniform random number per token and pick from the
            device's global generator.
        topk_ids: [T, K] picks to use instead; ids outside [0, E) get weight 0 and do not affect
            later picks. Random numbers are still drawn, so that a recomputation leaves the
            generator in the same state.

    Returns:
        topk_weights: [T, K] fp32 (fp64 for fp64).
        topk_ids: [T, K] int32.

    Ties: the smaller id. T = 0 works.

    Raises:
        ValueError: K is outside [1, E].

    Source: Liu et al. 2024 (GRIN, arXiv 2409.12136); Liu et al. 2023 (arXiv 2304.08612).
    """
    num_experts = router_logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"sparsemixer: top_k must be in [1, {num_experts}], got {top_k}.")
    acc = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    logits = router_logits.to(acc)
    left = torch.ones_like(logits, dtype=torch.bool)
    weights, picks = [], []
    for k in range(top_k):
        masked = logits.masked_fill(~left, -torch.inf)
        largest, best = masked.detach().max(-1, keepdim=True)
        # Earlier picks stay excluded through their -inf.
        distance = (largest - logits.detach()) / logits.detach().abs().clamp(min=largest)
        masked = masked.masked_fill(distance > 2 * eps, -torch.inf)
        probs = masked.softmax(-1)
        if training:
            gumbel = -torch.empty_like(masked).exponential_().log()
            pick = (masked.detach() + gumbel).max(-1, keepdim=True).indices
            coin = torch.rand_like(largest)
        else:
            pick = best
        valid = None
        if topk_ids is not None:
            given = topk_ids[:, k : k + 1].long()
            valid = (given >= 0) & (given < num_experts)
            pick = torch.where(valid, given, 0)
        weight = probs.gather(-1, pick)
        if training:
            exact = (pick == best) | (coin > 0.75)
            # The estimator's backward is that of the softmax without the factor, so the factor is
            # added as a constant instead of being multiplied in.
            weight = weight + torch.where(exact, 0.0, -2.0 / 3.0) * weight.detach()
        if valid is None:
            taken = torch.zeros_like(left).scatter(-1, pick, True)
            picks.append(pick)
        else:
            weight = weight.masked_fill(~valid, 0.0)
            taken = torch.zeros_like(left).scatter(-1, pick, valid)
            picks.append(torch.where(valid, pick, -1))
        left = left & ~taken
        weights.append(weight)
    return torch.cat(weights, -1), torch.cat(picks, -1).to(torch.int32)

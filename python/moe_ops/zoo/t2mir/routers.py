"""T2MIR's two routers and the contrastive loss of the second.

Letters: B sequences, L tokens of a sequence, T = B * L, H width, E experts, K experts per token.

Sources: Shazeer et al. 2017 (noisy top-k, arXiv 1701.06538); Wu et al. 2025 (T2MIR, arXiv
2506.05426).
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice

ROUTING = ("causal", "token", "sequence")


def gate_network(hidden_size: int, num_experts: int) -> nn.Sequential:
    """Returns a network H -> E -> tanh -> E without biases: logits of both routers."""
    return nn.Sequential(
        nn.Linear(hidden_size, num_experts, bias=False),
        nn.Tanh(),
        nn.Linear(num_experts, num_experts, bias=False),
    )


def squared_cv(values: Tensor) -> Tensor:
    """Returns the squared coefficient of variation over experts (variance over E - 1); 0 if all are
    equal."""
    if values.shape[0] == 1:
        return values.new_zeros(())
    return values.var() / (values.mean().square() + 1e-10)


def load_probability(clean: Tensor, noisy: Tensor, scale: Tensor, top_k: int) -> Tensor:
    """Returns P(expert is among the K best if its own noise were redrawn), [T, E].

    clean, noisy = clean + scale * normal, and scale are [T, E]. The comparison uses noisy logits:
    an expert is selected if its noisy logit exceeds the K-th best of the others, so P = Phi((clean
    - threshold) / scale). The threshold is the (K+1)-th best of all for a selected expert, and the
    K-th best for others.
    """
    num_experts = clean.shape[-1]
    if top_k >= num_experts:
        return torch.ones_like(clean)
    best = noisy.topk(top_k + 1, dim=-1).values
    last_in, first_out = best[:, top_k - 1 : top_k], best[:, top_k:]
    threshold = torch.where(noisy > first_out, first_out, last_in)
    return 0.5 * (1 + torch.erf((clean - threshold) / (scale * math.sqrt(2))))


class TokenRouting(NamedTuple):
    """Routing by token. topk_weights [T, K]; topk_ids [T, K]; balance_loss, a scalar (0 outside
    training)."""

    topk_weights: Tensor
    topk_ids: Tensor
    balance_loss: Tensor


class NoisyTopKRouter(nn.Module):
    """Token-wise router: the K best of logits with learned noise, weights softmax over those K.

    In training logits get softplus(x W) + 0.01 times a normal variate, W starting at 0. The loss is
    CV^2 of the experts' summed weights (importance) plus CV^2 of their expected tokens (load).
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        check_top_k("NoisyTopKRouter", top_k, num_experts)
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = gate_network(hidden_size, num_experts)
        self.noise = nn.Linear(hidden_size, num_experts, bias=False)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor) -> TokenRouting:
        """Routes x [T, H]."""
        clean = self.gate(x)
        noisy = clean
        if self.training:
            scale = F.softplus(self.noise(x)) + 0.01
            noisy = clean + scale * torch.randn_like(clean)
        best, ids = noisy.topk(self.top_k, dim=-1)
        weights = best.softmax(-1)
        loss = weights.new_zeros(())
        if self.training:
            importance = torch.zeros_like(clean).scatter(-1, ids, weights).sum(0)
            load = load_probability(clean, noisy, scale, self.top_k).sum(0)
            loss = squared_cv(importance) + squared_cv(load)
        return TokenRouting(weights, ids, loss)


class TaskRouting(NamedTuple):
    """Routing by task. topk_weights, topk_ids [B * L, K]; representation [B, E], for the
    contrastive loss."""

    topk_weights: Tensor
    topk_ids: Tensor
    representation: Tensor


class TaskRouter(nn.Module):
    """Task-wise router: routes by the content of a sequence.

    routing="causal": token t uses the mean logits of tokens 0..t. "sequence": all tokens use the
    mean over the whole sequence, as in the authors' `task_hard_router`; early tokens then depend on
    later ones, so training sees the future. "token": each uses its own logits. The representation
    is the mean over the sequence of the logits (of their softmax, with `softmax_representation`).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        routing: str = "causal",
        softmax_representation: bool = False,
    ) -> None:
        super().__init__()
        check_top_k("TaskRouter", top_k, num_experts)
        check_choice("TaskRouter", "routing", routing, ROUTING)
        self.num_experts, self.top_k = num_experts, top_k
        self.routing = routing
        self.softmax_representation = softmax_representation
        self.gate = gate_network(hidden_size, num_experts)

    def forward(self, x: Tensor) -> TaskRouting:
        """Routes x [B, L, H]."""
        logits = self.gate(x)
        if self.routing == "causal":
            count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=logits.dtype)
            chosen = logits.cumsum(1) / count[:, None]
        elif self.routing == "sequence":
            chosen = logits.mean(1, keepdim=True).expand_as(logits)
        else:
            chosen = logits
        best, ids = chosen.flatten(0, 1).topk(self.top_k, dim=-1)
        return TaskRouting(best.softmax(-1), ids, self.represent(logits))

    def represent(self, logits: Tensor) -> Tensor:
        return (logits.softmax(-1) if self.softmax_representation else logits).mean(1)


class MomentumContrast(nn.Module):
    """InfoNCE between routers of two sequences of one task: a bound on I(task; router).

    Rows i and i + B / 2 of a batch have equal tasks; all other rows have other tasks. Queries are
    the router's representations, keys those of a slow copy of its gate, and their similarity is q W
    k^T with a learned W [E, E].

    The copy has no gradient and is not an optimizer parameter: call `update(router)` after each
    optimizer step.
    """

    def __init__(self, router: TaskRouter, tau: float = 0.005) -> None:
        super().__init__()
        if not 0 < tau <= 1:
            raise ValueError(f"MomentumContrast: tau must be in (0, 1], got {tau}.")
        self.tau = tau
        self.target = copy.deepcopy(router).requires_grad_(False)
        self.weight = nn.Parameter(torch.randn(router.num_experts, router.num_experts))

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Returns representations [B, E] of the router's input [B, L, H] by the slow copy."""
        return self.target.represent(self.target.gate(x))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns the loss, a scalar, of queries and keys [B, E]; B even."""
        if queries.shape[0] % 2 or queries.shape != keys.shape:
            raise ValueError(
                "MomentumContrast: queries and keys must be [B, E] with B even, got shapes "
                f"{list(queries.shape)} and {list(keys.shape)}."
            )
        first, second = queries.chunk(2)
        key_first, key_second = keys.detach().chunk(2)
        label = torch.arange(first.shape[0], device=first.device)
        projected = self.weight
        return 0.5 * (
            F.cross_entropy(first @ projected @ key_second.T, label)
            + F.cross_entropy(second @ projected @ key_first.T, label)
        )

    @torch.no_grad()
    def update(self, router: TaskRouter) -> None:
        """Updates the slow copy: tau * router + (1 - tau) * copy."""
        for slow, fast in zip(self.target.parameters(), router.parameters(), strict=True):
            slow.lerp_(fast, self.tau)


def check_top_k(name: str, top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"{name}: top_k must be in [1, {num_experts}], got {top_k}.")

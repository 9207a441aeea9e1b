"""GNT-MOVE's layer: view experts behind a cosine router, and a permanent expert.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R rays, P
points of a ray, N pairs of rays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_least
from moe_ops.layers import Experts, GateRouter, MoE
from moe_ops.layers.functional import linear
from moe_ops.layers.routing import Routing

from ..t2mir.routers import load_probability, squared_cv


class ViewRouter(GateRouter):
    """Router that selects the K best of softmax over e of exp(s_e) (cos(x R, w_e) + noise), not
    renormalized.

    R maps H to max(E / 2, 1) features. In training the noise is normal with deviation 1 / E; in
    eval mode there is none. exp(s_e) is an expert's inverse temperature, 1 at the start.

    Parameters: weight [E, G] (rows w_e, drawn N(0, 1)); stem.weight [G, H] (R, as `nn.Linear`);
        temperature [E] (s, 0 at the start).

    Args:
        hidden_size, num_experts, top_k: H, E, K. noise: times 1 / E, of the logits in training.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, noise: float = 1.0, **options: Any
    ) -> None:
        check_least("ViewRouter", "noise", noise, 0)
        size = max(num_experts // 2, 1)
        super().__init__(hidden_size, num_experts, top_k, gate="cosine", gate_size=size, **options)
        self.noise = noise
        self.temperature = nn.Parameter(self.weight.new_zeros(num_experts))

    @property
    def draws_random_numbers(self) -> bool:  # type: ignore[override]
        return self.noise > 0

    def clean_logits(self, x: Tensor) -> Tensor:
        """Returns logits [T, E] of x [T, H] without noise."""
        assert self.stem is not None and self.temperature is not None
        z, rows = F.normalize(self.stem(x), dim=-1), F.normalize(self.weight, dim=-1)
        return linear(z, rows) * self.temperature.exp()

    def noise_scale(self) -> Tensor:
        """Returns the noise deviation [E] of each expert's logit."""
        assert self.temperature is not None
        return self.noise / self.num_experts * self.temperature.exp()

    def logits(self, x: Tensor) -> Tensor:
        clean = self.clean_logits(x)
        if not self.training or not self.noise:
            return clean
        return clean + torch.randn_like(clean) * self.noise_scale()

    def with_rows(self, num_experts: int, top_k: int, **changes: Any) -> Any:
        raise NotImplementedError(
            "ViewRouter: experts cannot be selected, added, split or merged: its temperatures have "
            "no rule for it."
        )


class ViewRouted(NamedTuple):
    """Routing of `ViewExperts`.

    routing: as for any router. logits: [T, E] without noise. balance: CV^2 of the experts' summed
    weights plus CV^2 of each expert's expected number of tokens, a scalar; 0 outside training.
    """

    routing: Routing
    logits: Tensor
    balance: Tensor


class FeedForward(nn.Module):
    """Linear map, relu, linear map."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y


class ViewExperts(nn.Module):
    """Computes y = (sum_k w_k expert_k(x) + permanent(x)) / 2, or the sum alone without the
    permanent expert.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I (of every network), E, K.
        permanent: if true, adds an expert applied to every token.
        noise: of `ViewRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        permanent: bool = True,
        noise: float = 1.0,
    ) -> None:
        super().__init__()
        self.moe = MoE(
            ViewRouter(hidden_size, num_experts, top_k, noise=noise),
            Experts(num_experts, hidden_size, intermediate_size, activation="gelu", bias=True),
            FeedForward(hidden_size, intermediate_size) if permanent else None,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ViewRouted]:
        """Returns y, shaped like x [..., H], and the routing."""
        out: Any = self.moe(x, return_routing=True)
        y = out.y if self.moe.shared_experts is None else 0.5 * out.y
        router: Any = self.moe.router
        flat = x.reshape(-1, x.shape[-1])
        clean = router.clean_logits(flat)
        balance = clean.new_zeros(())
        if self.training:
            balance = self._balance(router, clean, out.routing)
        return y, ViewRouted(out.routing, clean, balance)

    def _balance(self, router: Any, clean: Tensor, routing: Routing) -> Tensor:
        weights, ids = routing.topk_weights, routing.topk_ids.long()
        importance = clean.new_zeros(clean.shape).scatter(1, ids, weights.to(clean.dtype)).sum(0)
        loss = squared_cv(importance)
        if router.noise:
            # Threshold and noise are both on the scale of the noisy logits.
            scale = router.noise_scale().expand_as(clean)
            loss = loss + squared_cv(
                load_probability(clean, routing.router_logits, scale, router.top_k).sum(0)
            )
        return loss


class Neighbors(NamedTuple):
    """Nearest points of the second ray of N pairs, for each point of the first.

    nearest: [N, P] int64. weight: [N, P], softmax over the ray of minus the distance.
    """

    nearest: Tensor
    weight: Tensor


def neighbors(points: Tensor, pairs: Tensor) -> Neighbors:
    """Returns neighbors for points [R, P, 3] of rays and pairs [N, 2] of rays."""
    a, b = points[pairs[:, 0]], points[pairs[:, 1]]
    distance, nearest = torch.cdist(a, b).min(-1)
    return Neighbors(nearest, (-distance).softmax(-1))


def consistency_loss(logits: Tensor, pairs: Tensor, near: Neighbors) -> Tensor:
    """Computes how much the routing of neighboring points differs: half the symmetric
    Kullback-Leibler divergence of their distributions over experts, weighted mean over a ray, mean
    over pairs.

    Args:
        logits: [R, P, E] of one layer. pairs: [N, 2] of neighboring rays; 0 without any.
        near: result of `neighbors`.

    Source: Cong et al. 2023 (GNT-MOVE, arXiv 2308.11793).
    """
    if not len(pairs):
        return logits.sum() * 0
    logs = logits.log_softmax(-1)
    a, b = logs[pairs[:, 0]], logs[pairs[:, 1]]
    b = b.gather(1, near.nearest[..., None].expand(-1, -1, logits.shape[-1]))
    # (KL(a, b) + KL(b, a)) / 2 = sum (a - b) (log a - log b) / 2.
    divergence = 0.5 * ((a.exp() - b.exp()) * (a - b)).sum(-1)
    return (divergence * near.weight).sum(-1).mean()

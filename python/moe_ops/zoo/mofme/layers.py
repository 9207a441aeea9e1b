"""MoFME's layer: experts that modulate one shared network, and a router that knows how sure it is.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts a token, M passes of the
router.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.layers import Experts, TopKRouter
from moe_ops.layers.routing import Routing, drop_masked
from moe_ops.ops import moe_linear_reduce


class FiLMExperts(nn.Module):
    """y = sum_k w_k (a_k * h + c_k), a_k = W1_e h + b1_e and c_k = W2_e h + b2_e: experts that are
    feature-wise modulations of one h.

    The sum over experts is of their modulations, which h takes once: one product a slot.

    Parameters:
        weight: [E, 2H, H], W1 first. bias: [E, 2H].

    Args:
        num_experts, hidden_size: E and H, at least 1.
        device, dtype: of the parameters.

    Initialisation: each map as `nn.Linear`, uniform in +-1/sqrt(H).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1 or hidden_size < 1:
            raise ValueError(
                "FiLMExperts: num_experts and hidden_size must be at least 1, got "
                f"{num_experts} and {hidden_size}."
            )
        self.num_experts, self.hidden_size = num_experts, hidden_size
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, 2 * hidden_size, hidden_size, **where))
        self.bias = nn.Parameter(torch.empty(num_experts, 2 * hidden_size, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values described above."""
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, h: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """h [T, H], topk_weights and topk_ids [T, K] to y [T, H], in the dtype of h; ids outside
        [0, E) contribute nothing."""
        slots = h[:, None].expand(-1, topk_ids.shape[1], -1)
        modulation = moe_linear_reduce(slots, self.weight, topk_weights, topk_ids, bias=self.bias)
        scale, shift = modulation.chunk(2, dim=-1)
        return scale * h + shift

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"


class UncertaintyRouter(TopKRouter):
    """Softmax over the K best logits; in training by M passes with dropout (Monte-Carlo dropout).

    A pass m drops features of x and gives logits z_m. The experts chosen are the K best of mean_m
    z_m. Each pass has weights softmax(z_m) over those; w = mean_m / (1 + deviation_m), divided by
    its sum: experts of which the passes disagree weigh less. No gradient goes through the
    deviation. In eval mode one pass without dropout.

    With dropout 0 all passes are the same, and the router is `TopKRouter(..., topk_first=True)`.

    Args:
        hidden_size, num_experts, top_k, options: see `TopKRouter`.
        passes: M, at least 2. dropout: probability, in [0, 1).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        passes: int = 5,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        if passes < 2:
            raise ValueError(f"UncertaintyRouter: passes must be at least 2, got {passes}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"UncertaintyRouter: dropout must be in [0, 1), got {dropout}.")
        super().__init__(hidden_size, num_experts, top_k, **{"topk_first": True, **options})
        self.passes, self.dropout = passes, dropout

    @property
    def draws_random_numbers(self) -> bool:  # type: ignore[override]
        return self.dropout > 0

    def forward(
        self, x: Tensor, *, topk_ids: Tensor | None = None, expert_mask: Tensor | None = None
    ) -> Routing:
        if not self.training:
            return super().forward(x, topk_ids=topk_ids, expert_mask=expert_mask)
        logits = self.pass_logits(x)
        mean = logits.mean(0)
        if topk_ids is None:
            ids = self.choose(mean, expert_mask=expert_mask)
            self.count(ids, mean, expert_mask)
        else:
            ids = drop_masked(topk_ids, expert_mask)
        each = torch.stack([self.weights_at(z, ids, expert_mask=expert_mask) for z in logits])
        return Routing(mean, calibrated(each), ids)

    def pass_logits(self, x: Tensor) -> Tensor:
        """Logits of M passes with dropout, [M, T, E]."""
        dropped = F.dropout(x.expand(self.passes, *x.shape), self.dropout, training=True)
        return self.logits(dropped.flatten(0, 1)).unflatten(0, (self.passes, -1))


def calibrated(weights: Tensor) -> Tensor:
    """Weights [T, K] of M passes [M, T, K]: their mean over 1 + their deviation, divided by the
    sum; 0 where a token has none."""
    made = weights.mean(0) / (1 + weights.detach().std(0))
    return made / made.sum(-1, keepdim=True).clamp(min=1e-20)


class SharedBase(nn.Module):
    """h = gelu(W_a x) * (W_b x), what all FiLM experts modulate."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.a = nn.Linear(hidden_size, hidden_size)
        self.b = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = F.gelu(self.a(x)) * self.b(x)
        return product


class MoFME(nn.Module):
    """y = adaptor(sum_k w_k FiLM_e(h)), h = base(norm(x)): a mixture in the place of a feed-forward
    network. With experts="ffn" the mixture that it is compared with, y = sum_k w_k FFN_e(norm(x)).

    The router reads x itself, as published.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I (of the adaptor, and of FFN
            experts), E, K.
        experts: "film" or "ffn". router: "uncertainty" or "plain". passes, router_dropout: of
            `UncertaintyRouter`. dropout: behind the output.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        experts: str = "film",
        router: str = "uncertainty",
        passes: int = 5,
        router_dropout: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.router: TopKRouter
        if router == "uncertainty":
            self.router = UncertaintyRouter(
                hidden_size, num_experts, top_k, bias=True, passes=passes, dropout=router_dropout
            )
        else:
            self.router = TopKRouter(hidden_size, num_experts, top_k, bias=True, topk_first=True)
        self.experts: FiLMExperts | Experts
        self.base: nn.Module = nn.Identity()
        self.adaptor: nn.Module = nn.Identity()
        if experts == "film":
            self.experts = FiLMExperts(num_experts, hidden_size)
            self.base = SharedBase(hidden_size)
            self.adaptor = feed_forward(hidden_size, intermediate_size)
        else:
            self.experts = Experts(
                num_experts, hidden_size, intermediate_size, activation="gelu", bias=True
            )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [..., H] to y of its shape, and the routing of its T tokens."""
        flat = x.flatten(0, -2)
        routing = self.router(flat)
        h = self.base(self.norm(flat))
        y = self.adaptor(self.experts(h, routing.topk_weights, routing.topk_ids))
        return self.dropout(y).view(x.shape), routing

    def expert_parameters(self) -> int:
        """Parameters that there are once an expert: what grows with E, the router apart."""
        return sum(p.numel() for p in self.experts.parameters())


def feed_forward(hidden_size: int, intermediate_size: int) -> nn.Sequential:
    """Linear, gelu, linear."""
    return nn.Sequential(
        nn.Linear(hidden_size, intermediate_size),
        nn.GELU(),
        nn.Linear(intermediate_size, hidden_size),
    )

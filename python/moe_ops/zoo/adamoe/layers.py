"""AdaMoE's layer: a router that chooses by one number and weighs by another.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._fields import check_choice
from moe_ops.layers import Experts, MoE, SharedExperts, TopKRouter
from moe_ops.layers.losses import load_balancing_loss
from moe_ops.layers.routing import Routing

VARIANTS = ("coupled", "additive", "concat")


class ScaledRouter(TopKRouter):
    """Top-K of r = softmax(x W_r^T), with weights that are not those of the choice.

    - "coupled": weight r of the chosen expert, not renormalised; no scale adapter.
    - "additive": r + s with s = x W_s^T + b_s, of any sign and size.
    - "concat": softmax([x, r] W_s^T) over all experts, at those chosen.

    The gradient of a balance loss then moves W_r alone, and the size of an expert's output can
    follow the task through W_s whatever the balance asks of the choice.

    Parameters: weight [E, H]; scale_weight [E, H] ("additive") or [E, H + E] ("concat");
        scale_bias [E] ("additive").

    Args:
        init_std: of weight and scale_weight, which are drawn from a normal distribution.
        preserve: for "additive": scale_bias starts at 1/K - 1/E instead of 0. The weights of a
            token then add up to about 1, since r is about 1/E at the start: a layer whose experts
            are copies of one network starts close to it.
        hidden_size, num_experts, top_k, options: as of `Router`.

    Raises:
        ValueError: an unknown variant, or `preserve` with another one than "additive".
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        variant: str = "additive",
        init_std: float = 0.006,
        preserve: bool = False,
        **options: Any,
    ) -> None:
        check_choice("ScaledRouter", "variant", variant, VARIANTS)
        if preserve and variant != "additive":
            raise ValueError(
                f"ScaledRouter: preserve must be False with variant {variant!r}, got True."
            )
        # `reset_parameters` is called by the base.
        self.variant, self.init_std, self.preserve = variant, init_std, preserve
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.scale_weight: nn.Parameter | None = None
        self.scale_bias: nn.Parameter | None = None
        if variant != "coupled":
            width = hidden_size + (num_experts if variant == "concat" else 0)
            self.scale_weight = nn.Parameter(self.weight.new_empty(num_experts, width))
        if variant == "additive":
            self.scale_bias = nn.Parameter(self.weight.new_empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        # The base calls this before there are scales.
        scale_weight, scale_bias = (getattr(self, f"scale_{n}", None) for n in ("weight", "bias"))
        if scale_weight is not None:
            nn.init.normal_(scale_weight, std=self.init_std)
        if scale_bias is not None:
            start = 1 / self.top_k - 1 / self.num_experts if self.preserve else 0.0
            nn.init.constant_(scale_bias, start)

    def forward(
        self, x: Tensor, *, topk_ids: Tensor | None = None, expert_mask: Tensor | None = None
    ) -> Routing:
        routing = super().forward(x, topk_ids=topk_ids, expert_mask=expert_mask)
        return routing._replace(topk_weights=self.scaled(x, routing))

    def scaled(self, x: Tensor, routing: Routing) -> Tensor:
        """The weights [T, K] of a choice whose own weights are those of the router, r."""
        ids = routing.topk_ids.long()
        empty = (ids < 0) | (ids >= self.num_experts)
        ids = ids.masked_fill(empty, 0)
        weights = routing.topk_weights
        if self.variant == "additive":
            assert self.scale_weight is not None and self.scale_bias is not None
            scale = torch.nn.functional.linear(x, self.scale_weight, self.scale_bias)
            weights = weights + scale.gather(1, ids).to(weights.dtype)
        elif self.variant == "concat":
            assert self.scale_weight is not None
            both = torch.cat([x, routing.router_logits.softmax(-1).to(x.dtype)], dim=-1)
            scores = torch.nn.functional.linear(both, self.scale_weight).to(weights.dtype)
            weights = scores.softmax(-1).gather(1, ids)
        return weights.masked_fill(empty, 0.0)

    def with_rows(self, num_experts: int, top_k: int, **changes: Any) -> TopKRouter:
        raise NotImplementedError(
            "ScaledRouter: experts cannot be selected, added, split or merged: its scales have no "
            "rule for it."
        )


class AdaMoE(nn.Module):
    """y = (shared(x) + sum_k w_k expert_k(x)) / 2, a feed-forward network made sparse.

    With copies of a dense network as experts y starts at (1 + sum of weights) / 2 times what the
    dense network says: 0.625 of it at E = 4, K = 1 and weights of 1/E, as published, and about all
    of it with `preserve`.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K.
        activation: of all networks.
        variant, init_std, preserve: of `ScaledRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        activation: str = "geglu_tanh",
        variant: str = "additive",
        init_std: float = 0.006,
        preserve: bool = False,
    ) -> None:
        super().__init__()
        router = ScaledRouter(
            hidden_size,
            num_experts,
            top_k,
            variant=variant,
            init_std=init_std,
            preserve=preserve,
        )
        self.moe = MoE(
            router,
            Experts(num_experts, hidden_size, intermediate_size, activation=activation),
            SharedExperts(hidden_size, intermediate_size, activation=activation),
        )

    @classmethod
    def from_dense(
        cls,
        dense: SharedExperts,
        num_experts: int,
        top_k: int = 1,
        *,
        noise: float = 0.0,
        **options: Any,
    ) -> AdaMoE:
        """Experts and the shared network are copies of a dense one.

        Args:
            noise: deviation of what is added to every weight of the experts; the authors' text has
                0, the default of their code is 0.01.
            options: variant, init_std, preserve.
        """
        made = cls(
            dense.hidden_size,
            dense.intermediate_size,
            num_experts,
            top_k,
            activation=dense.activation,
            **options,
        ).to(dense.w_down)
        assert made.moe.shared_experts is not None
        made.moe.shared_experts.load_state_dict(dense.state_dict())
        with torch.no_grad():
            for name in ("w_gate_up", "w_down"):
                target = getattr(made.moe.experts, name)
                target.copy_(getattr(dense, name))
                if noise:
                    target.add_(torch.randn_like(target), alpha=noise)
        return made

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [..., H] to y of its shape, and the routing of its T tokens."""
        out: Any = self.moe(x, return_routing=True)
        return 0.5 * out.y, out.routing


def adamoe_balance_loss(routing: Routing) -> Tensor:
    """mean_e(f_e P_e), f_e the tokens on expert e over all tokens, P_e the mean of r_e.

    The balance loss of the Switch Transformer times K / E^2: 1 at perfect balance becomes K / E^2.
    """
    count = routing.router_logits.shape[-1]
    slots = routing.topk_ids.shape[-1] / count**2
    return slots * load_balancing_loss(routing.router_logits, routing.topk_ids)

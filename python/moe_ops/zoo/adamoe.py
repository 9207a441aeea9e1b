"""AdaMoE: a dense feed-forward network converted to experts in the action expert of a
vision-language-action model. The router selects experts by one score and weighs them by another.

Example:
    policy = zoo.create_model("adamoe", ffn="dense")          # train it, then
    sparse = policy.made_sparse("additive", num_experts=4)

Source: Shen et al. 2025 (Expertise need not monopolize: Action-Specialized Mixture of Experts for
Vision-Language-Action Learning, arXiv 2510.14300); Black et al. 2024 (pi0, arXiv 2410.24164).

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token, B states, C
actions of a chunk, A size of an action.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_divides
from moe_ops.layers import AddRMSNorm, Experts, MoE, SharedExperts, TopKRouter
from moe_ops.layers.losses import load_balancing_loss
from moe_ops.layers.routing import Routing
from moe_ops.layers.self_attention import JointAttention

from ._presets import preset

__all__ = ["ActionTransformer", "AdaMoE", "AdaMoEConfig", "ScaledRouter", "adamoe_balance_loss"]

VARIANTS = ("coupled", "additive", "concat")


class ScaledRouter(TopKRouter):
    """Top-K of r = softmax(x W_r^T), with weights that differ from the selection scores.

    - "coupled": weight r of the chosen expert, not renormalized; no scale adapter. - "additive": r
    + s with s = x W_s^T + b_s, of any sign and size. - "concat": softmax([x, r] W_s^T) over all
    experts, at those chosen.

    A balance loss then has gradients for W_r alone, and W_s can scale an expert's output by task,
    independently of what balance requires from the selection.

    Parameters: weight [E, H]; scale_weight [E, H] ("additive") or [E, H + E] ("concat");
        scale_bias [E] ("additive").

    Args:
        init_std: of weight and scale_weight, which are drawn from a normal distribution.
        preserve: for "additive": scale_bias starts at 1/K - 1/E instead of 0. The weights of a
            token then add up to about 1, since r is about 1/E at the start: a layer whose experts
            are copies of one network starts close to it.
        hidden_size, num_experts, top_k, options: see `Router`.

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
        # The base class calls this before the scale weights exist.
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
        """Returns weights [T, K] for a top-k selection whose own weights are the router's scores
        r."""
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

    With copies of a dense network as experts, y starts at (1 + sum of weights) / 2 times the dense
    output: 0.625 times at E = 4, K = 1 and weights of 1/E, as published, and about 1 times with
    `preserve`.

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
        """Creates experts and the shared network as copies of a dense one.

        Args:
            noise: standard deviation of the noise added to every expert weight; 0 in the paper,
                0.01 by default in the authors' code.
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
        """Returns y, with the shape of x [..., H], and the routing of its T tokens."""
        out: Any = self.moe(x, return_routing=True)
        return 0.5 * out.y, out.routing


def adamoe_balance_loss(routing: Routing) -> Tensor:
    """Returns mean_e(f_e P_e), where f_e is the fraction of tokens on expert e and P_e the mean of
    r_e.

    The balance loss of the Switch Transformer times K / E^2: 1 at perfect balance becomes K / E^2.
    """
    count = routing.router_logits.shape[-1]
    slots = routing.topk_ids.shape[-1] / count**2
    return slots * load_balancing_loss(routing.router_logits, routing.topk_ids)


FFNS = ("dense", *VARIANTS)


@dataclass(frozen=True)
class AdaMoEConfig:
    """Sizes and options.

    Attributes:
        state_size, num_skills: sizes of the policy's inputs. action_size: A. chunk: C.
        hidden_size, num_layers, num_heads, intermediate_size: of the transformer.
        ffn: "dense", or a variant of `ScaledRouter`, in every layer.
        num_experts, top_k: E and K. init_std, preserve: of `ScaledRouter`.
        balance_weight: of the balance loss, summed over layers.
        flow_steps: of Euler's method, to draw actions.
    """

    state_size: int = 4
    num_skills: int = 8
    action_size: int = 2
    chunk: int = 4
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 128
    ffn: str = "additive"
    num_experts: int = 4
    top_k: int = 1
    init_std: float = 0.006
    preserve: bool = False
    balance_weight: float = 0.01
    flow_steps: int = 10

    def __post_init__(self) -> None:
        check_choice("AdaMoEConfig", "ffn", self.ffn, FFNS)
        half = self.hidden_size / 2
        check_divides("AdaMoEConfig", "num_heads", self.num_heads, "hidden_size / 2", half)

    tiny = preset("Two layers for the point with eight skills.")
    pi0_action = preset(
        "The sizes of pi0's action expert with four experts a layer. It is the network of "
        "actions alone, without the vision-language model that pi0 attends to.",
        state_size=32,
        num_skills=1,
        action_size=32,
        chunk=50,
        hidden_size=1024,
        num_layers=18,
        num_heads=8,
        intermediate_size=4096,
    )


class FlowLoss(NamedTuple):
    """Loss = action + weight * balance. action: flow matching, mean over all elements of a chunk.
    balance: summed over layers, 0 for dense networks. routing: one entry per sparse layer."""

    loss: Tensor
    action: Tensor
    balance: Tensor
    routing: list[Routing]


class ActionBlock(nn.Module):
    """Computes x + attention(norm(x)), then x + ffn(norm(x)), with attention between all tokens."""

    def __init__(self, config: AdaMoEConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm = AddRMSNorm(hidden)
        self.attention = JointAttention(hidden, config.num_heads, out_bias=False)
        self.ffn_norm = AddRMSNorm(hidden)
        self.ffn: nn.Module
        if config.ffn == "dense":
            self.ffn = SharedExperts(hidden, config.intermediate_size, activation="geglu_tanh")
        else:
            self.ffn = AdaMoE(
                hidden, config.intermediate_size, config.num_experts, config.top_k,
                variant=config.ffn, init_std=config.init_std, preserve=config.preserve,
            )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        normed, x = self.ffn_norm(x, self.attention(self.attention_norm(x)[0]))
        out = self.ffn(normed)
        y, routing = out if isinstance(out, tuple) else (out, None)
        return x + y, routing


class ActionTransformer(nn.Module):
    """Model of the velocity of a noisy chunk of actions, given a state, a skill and a time.

    Tokens: the state, the skill, and each action of the chunk with the time and its position.
    """

    def __init__(self, config: AdaMoEConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.state = nn.Linear(config.state_size, hidden)
        self.skill = nn.Embedding(config.num_skills, hidden)
        self.action = nn.Linear(config.action_size, hidden)
        self.time = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.place = nn.Parameter(0.02 * torch.randn(config.chunk, hidden))
        self.layers = nn.ModuleList(ActionBlock(config) for _ in range(config.num_layers))
        self.norm = AddRMSNorm(hidden)
        self.velocity = nn.Linear(hidden, config.action_size)

    def forward(
        self, states: Tensor, skills: Tensor, noisy: Tensor, time: Tensor
    ) -> tuple[Tensor, list[Routing]]:
        """Returns the velocity [B, C, A] and the routing of each sparse layer, for states [B, S],
        skills [B], noisy [B, C, A] and time [B] in [0, 1]."""
        moment = self.time(time_features(time, self.config.hidden_size))
        actions = self.action(noisy) + self.place + moment[:, None]
        x = torch.cat([self.state(states)[:, None], self.skill(skills)[:, None], actions], dim=1)
        routing = []
        for layer in self.layers:
            x, routed = layer(x)
            if routed is not None:
                routing.append(routed)
        velocity: Tensor = self.velocity(self.norm(x[:, 2:])[0])
        return velocity, routing

    def loss(
        self,
        states: Tensor,
        skills: Tensor,
        actions: Tensor,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        balance_weight: float | None = None,
        generator: torch.Generator | None = None,
    ) -> FlowLoss:
        """Computes the flow matching loss: at x = t noise + (1 - t) actions the velocity should be
        noise - actions.

        Args:
            actions: [B, C, A]. noise: like actions, standard normal; None: drawn.
            time: [B]; None: drawn, Beta(1.5, 1) * 0.999 + 0.001, which prefers noisy actions.
            balance_weight: None: the config's `balance_weight`.
        """
        if noise is None:
            noise = torch.randn(actions.shape, generator=generator).to(actions)
        if time is None:
            # The inverse of the distribution function of Beta(1.5, 1), t^1.5.
            uniform = torch.rand(len(actions), generator=generator).to(actions)
            time = uniform ** (2 / 3) * 0.999 + 0.001
        at = time[:, None, None]
        velocity, routing = self(states, skills, at * noise + (1 - at) * actions, time)
        action = F.mse_loss(velocity, noise - actions)
        balance = sum((adamoe_balance_loss(r) for r in routing), action.new_zeros(()))
        weight = self.config.balance_weight if balance_weight is None else balance_weight
        return FlowLoss(action + weight * balance, action, balance, routing)

    @torch.no_grad()
    def act(
        self, states: Tensor, skills: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns chunks of actions [B, C, A], integrated from noise at t = 1 to t = 0 by Euler's
        method."""
        config = self.config
        shape = (len(states), config.chunk, config.action_size)
        x = torch.randn(shape, generator=generator).to(states)
        for step in range(config.flow_steps):
            time = x.new_full((len(x),), 1 - step / config.flow_steps)
            x = x - self(states, skills, x, time)[0] / config.flow_steps
        return x

    def made_sparse(self, variant: str, *, noise: float = 0.0, **changes: Any) -> ActionTransformer:
        """Returns a copy of this dense policy with AdaMoE layers, made from copies of its
        feed-forward networks.

        Args:
            variant: of `ScaledRouter`. noise: see `AdaMoE.from_dense`.
            changes: of the config: num_experts, top_k, init_std, preserve, balance_weight.

        Raises:
            ValueError: this policy is sparse already.
        """
        if self.config.ffn != "dense":
            raise ValueError(
                "ActionTransformer: ffn must be 'dense' to be made sparse, got "
                f"{self.config.ffn!r}."
            )
        config = dataclasses.replace(self.config, ffn=variant, **changes)
        made = ActionTransformer(config).to(self.velocity.weight)
        made.load_state_dict(self.state_dict(), strict=False)
        pairs: Any = zip(self.layers, made.layers, strict=True)
        for old, new in pairs:
            new.ffn = AdaMoE.from_dense(
                old.ffn, config.num_experts, config.top_k, noise=noise, variant=variant,
                init_std=config.init_std, preserve=config.preserve,
            )  # fmt: skip
        return made


def time_features(time: Tensor, size: int) -> Tensor:
    """Returns [B, size] features of time [B]: sines and cosines of periods from 0.004 to 4, as in
    pi0."""
    share = torch.linspace(0, 1, size // 2, dtype=torch.float64, device=time.device)
    period = 0.004 * (4.0 / 0.004) ** share
    angle = 2 * math.pi * time.double()[:, None] / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(time.dtype)

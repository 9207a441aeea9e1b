"""A flow-matching policy whose feed-forward networks can be made sparse.

Letters: B states, C actions of a chunk, A size of an action, H hidden size.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice
from moe_ops.layers import ResidualNorm, SharedExperts
from moe_ops.layers.routing import Routing

from .._presets import preset
from .layers import VARIANTS, AdaMoE, adamoe_balance_loss

FFNS = ("dense", *VARIANTS)


@dataclass(frozen=True)
class AdaMoEConfig:
    """Sizes and choices.

    Attributes:
        state_size, num_skills: of what the policy sees. action_size: A. chunk: C.
        hidden_size, num_layers, num_heads, intermediate_size: of the transformer.
        ffn: "dense", or a variant of `ScaledRouter`, in every layer.
        num_experts, top_k: E and K. init_std, preserve: of `ScaledRouter`.
        balance_weight, late_balance_weight: of the balance loss, summed over layers, in the first
            `early_steps` steps and afterwards.
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
    late_balance_weight: float = 0.005
    early_steps: int = 500
    flow_steps: int = 10

    def __post_init__(self) -> None:
        check_choice("AdaMoEConfig", "ffn", self.ffn, FFNS)
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"AdaMoEConfig: hidden_size must be a multiple of {2 * self.num_heads}, got "
                f"{self.hidden_size}."
            )

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
    """loss = action + weight * balance. action: flow matching, mean over all numbers of a chunk.
    balance: summed over layers, 0 for dense networks. z: mean of the routers' squared logsumexp,
    for watching. routing: of each sparse layer."""

    loss: Tensor
    action: Tensor
    balance: Tensor
    z: Tensor
    routing: list[Routing]


class ActionBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); every token sees every other one."""

    def __init__(self, config: AdaMoEConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.attention_norm = ResidualNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = ResidualNorm(hidden)
        self.ffn: nn.Module
        if config.ffn == "dense":
            self.ffn = SharedExperts(hidden, config.intermediate_size, activation="geglu_tanh")
        else:
            self.ffn = AdaMoE(
                hidden, config.intermediate_size, config.num_experts, config.top_k,
                variant=config.ffn, init_std=config.init_std, preserve=config.preserve,
            )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        heads = self.qkv(self.attention_norm(x)[0]).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        normed, x = self.ffn_norm(x, attended)
        out = self.ffn(normed)
        y, routing = out if isinstance(out, tuple) else (out, None)
        return x + y, routing


class ActionTransformer(nn.Module):
    """The velocity of a noisy chunk of actions, given a state, a skill and a time.

    Tokens: the state, the skill, and each action of the chunk with the time and its place.
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
        self.norm = ResidualNorm(hidden)
        self.velocity = nn.Linear(hidden, config.action_size)

    def forward(
        self, states: Tensor, skills: Tensor, noisy: Tensor, time: Tensor
    ) -> tuple[Tensor, list[Routing]]:
        """states [B, S], skills [B], noisy [B, C, A], time [B] in [0, 1] to the velocity
        [B, C, A] and the routing of each sparse layer."""
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
        """Flow matching: at x = t noise + (1 - t) actions the velocity should be noise - actions.

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
        zero = action.new_zeros(())
        balance = sum((adamoe_balance_loss(r) for r in routing), zero)
        with torch.no_grad():
            z = sum((r.router_logits.logsumexp(-1).square().mean() for r in routing), zero)
        weight = self.config.balance_weight if balance_weight is None else balance_weight
        return FlowLoss(action + weight * balance, action, balance, z, routing)

    @torch.no_grad()
    def act(
        self, states: Tensor, skills: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Chunks of actions [B, C, A]: from noise at t = 1 to t = 0 by Euler's method."""
        config = self.config
        shape = (len(states), config.chunk, config.action_size)
        x = torch.randn(shape, generator=generator).to(states)
        for step in range(config.flow_steps):
            time = x.new_full((len(x),), 1 - step / config.flow_steps)
            x = x - self(states, skills, x, time)[0] / config.flow_steps
        return x

    def made_sparse(self, variant: str, *, noise: float = 0.0, **changes: Any) -> ActionTransformer:
        """A copy of this dense policy whose feed-forward networks are AdaMoE layers of copies.

        Args:
            variant: of `ScaledRouter`. noise: see `AdaMoE.from_dense`.
            changes: of the config: num_experts, top_k, init_std, preserve, weights of the loss.

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
    """[B] to [B, size]: sines and cosines of periods from 0.004 to 4, as pi0 has them."""
    share = torch.linspace(0, 1, size // 2, dtype=torch.float64, device=time.device)
    period = 0.004 * (4.0 / 0.004) ** share
    angle = 2 * math.pi * time.double()[:, None] / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(time.dtype)

"""The transformer of T2MIR.

A causal transformer over state, action and reward tokens; its last layer's feed-forward network is
a mixture of experts routed by token beside one routed by task.

Letters: B sequences, S steps of context, L tokens, H width, A action size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_divides
from moe_ops.layers import Experts
from moe_ops.layers.self_attention import JointAttention

from .._presets import preset
from .routers import ROUTING, MomentumContrast, NoisyTopKRouter, TaskRouter


@dataclass(frozen=True)
class T2MIRConfig:
    """Sizes and options.

    Attributes:
        variant: "ad": the context is a history of episodes, and each step's action is predicted
            from its state. "dpt": a query state comes first, then a prompt of steps; every
            prediction is of the query's best action.
        state_size: width of a state. num_actions: number of discrete actions, 0 for continuous ones
            of width action_size in [-1, 1].
        hidden_size, num_layers, num_heads, dropout: of the transformer.
        max_steps: longest context.
        token_experts, token_top_k, task_experts, task_top_k: E and K of the two kinds of experts in
            the last layer, each with half the width.
        expert_hidden: width of an expert; 0 is 2 * hidden_size.
        routing: "causal", "token" or "sequence", see `TaskRouter`.
        softmax_representation: see `TaskRouter`.
        tau: of the slow router.
    """

    variant: str = "ad"
    state_size: int = 2
    action_size: int = 2
    num_actions: int = 0
    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 4
    dropout: float = 0.05
    max_steps: int = 80
    token_experts: int = 6
    token_top_k: int = 2
    task_experts: int = 8
    task_top_k: int = 2
    expert_hidden: int = 0
    routing: str = "causal"
    softmax_representation: bool = False
    tau: float = 0.005

    def __post_init__(self) -> None:
        check_choice("T2MIRConfig", "variant", self.variant, ("ad", "dpt"))
        check_choice("T2MIRConfig", "routing", self.routing, ROUTING)
        half = self.hidden_size / 2
        check_divides("T2MIRConfig", "num_heads", self.num_heads, "hidden_size / 2", half)

    @property
    def output_size(self) -> int:
        """Returns the width of a prediction: logits of discrete actions, or the action."""
        return self.num_actions or self.action_size

    tiny = preset(
        "For tests and tries.",
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        dropout=0.0,
        max_steps=24,
    )
    point_robot = preset(
        "The authors' sizes for continuous control: four episodes of 20 steps, width 128.",
        hidden_size=128,
        num_heads=8,
    )
    dark_room = preset(
        "The authors' sizes for DarkRoom with DPT: a prompt of 100 steps, width 64.",
        variant="dpt",
        num_actions=5,
        num_layers=4,
        num_heads=8,
        max_steps=100,
        dropout=0.05,
    )


class T2MIROutput(NamedTuple):
    """Output of T2MIR.

    actions: [B, P, A] with P = S ("ad") or 1 + S ("dpt": at the query, then at each state); logits
        of discrete actions, or actions in [-1, 1]. representation: [B, E] of the task
        router. balance_loss: of the token router; 0 outside training.
        contrastive_loss: 0 unless requested.
    """

    actions: Tensor
    representation: Tensor
    balance_loss: Tensor
    contrastive_loss: Tensor


class Attention(JointAttention):
    """Causal attention with heads of one size, normalized before and after (NormFormer)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__(hidden_size, num_heads, bias=True)
        self.norm, self.after = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.dropout = dropout

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        p = self.dropout if self.training else 0.0
        return F.dropout(self.after(super().forward(self.norm(x), causal=True, dropout=p)), p)


class ExpertLayer(nn.Module):
    """The last layer's feed-forward part: token-wise and task-wise experts side by side."""

    def __init__(self, config: T2MIRConfig) -> None:
        super().__init__()
        size = config.hidden_size
        hidden = config.expert_hidden or 2 * size
        kind: dict[str, Any] = {"output_size": size // 2, "activation": "gelu", "bias": True}
        self.norm = nn.LayerNorm(size)
        self.dropout = config.dropout
        self.token_router = NoisyTopKRouter(size, config.token_experts, config.token_top_k)
        self.token_experts = Experts(config.token_experts, size, hidden, **kind)
        self.task_router = TaskRouter(
            size,
            config.task_experts,
            config.task_top_k,
            routing=config.routing,
            softmax_representation=config.softmax_representation,
        )
        self.task_experts = Experts(config.task_experts, size, hidden, **kind)
        self.contrast = MomentumContrast(self.task_router, config.tau)

    def forward(self, x: Tensor, contrastive: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = self.norm(x)
        flat = h.flatten(0, 1)
        weights, ids, balance = self.token_router(flat)
        token = self.token_experts(flat, weights, ids)
        weights, ids, representation = self.task_router(h)
        task = self.task_experts(flat, weights, ids)
        contrast = x.new_zeros(())
        if contrastive:
            contrast = self.contrast(representation, self.contrast.keys(h))
        y = torch.cat([token, task], dim=-1).view_as(x)
        return F.dropout(y, self.dropout, self.training), representation, balance, contrast


class T2MIR(nn.Module):
    """The model, either variant."""

    def __init__(self, config: T2MIRConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embed_state = nn.Linear(config.state_size, size)
        self.embed_action = nn.Linear(config.output_size, size)
        self.embed_reward = nn.Linear(1, size)
        self.embed_kind = nn.Parameter(torch.zeros(3, size))
        # One more than the steps, for the query of "dpt".
        self.embed_step = nn.Embedding(config.max_steps + 1, size)
        nn.init.normal_(self.embed_step.weight, std=0.02)
        self.attention = nn.ModuleList(
            Attention(size, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )
        self.dense = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(size),
                nn.Linear(size, 4 * size),
                nn.GELU(),
                nn.Linear(4 * size, size),
                nn.Dropout(config.dropout),
            )
            for _ in range(config.num_layers - 1)
        )
        self.experts: Any = self.make_experts(config)
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, config.output_size)

    def make_experts(self, config: Any) -> nn.Module:
        """Returns the last layer's feed-forward part."""
        return ExpertLayer(config)

    def forward(
        self,
        states: Tensor,
        actions: Tensor,
        rewards: Tensor,
        query: Tensor | None = None,
        *,
        contrastive: bool = False,
    ) -> T2MIROutput:
        """Predicts actions.

        Args:
            states: [B, S, state_size]; S may be 0 with "dpt".
            actions: [B, S] int (discrete) or [B, S, A]. With "ad" the last step's action is unused:
                a prediction reads the previous steps and its own state.
            rewards: [B, S].
            query: [B, state_size], with "dpt" and only then.
            contrastive: compute the contrastive loss; rows i and i + B / 2 belong to one task.

        Raises:
            ValueError: shapes that do not fit, a context longer than max_steps.
        """
        x, positions = self._tokens(states, actions, rewards, query)
        for attention, dense in zip(self.attention, self.dense, strict=False):
            x = x + attention(x)
            x = x + dense(x)
        x = x + self.attention[-1](x)
        y, *routed = self.experts(x, contrastive)
        y = self.head(self.norm((x + y)[:, positions]))
        return T2MIROutput(y if self.config.num_actions else y.tanh(), *routed)

    def _tokens(
        self, states: Tensor, actions: Tensor, rewards: Tensor, query: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns tokens [B, L, H] and the positions of those that predict."""
        config = self.config
        batch, steps = states.shape[:2]
        wanted = (batch, steps) if config.num_actions else (batch, steps, config.action_size)
        if tuple(actions.shape) != wanted or rewards.shape != (batch, steps):
            raise ValueError(
                f"T2MIR: actions and rewards must be {list(wanted)} and {[batch, steps]}, got "
                f"shapes {list(actions.shape)} and {list(rewards.shape)}."
            )
        if steps > config.max_steps:
            raise ValueError(
                f"T2MIR: states must have at most {config.max_steps} steps, got {steps}."
            )
        if (query is not None) != (config.variant == "dpt"):
            raise ValueError(
                f'T2MIR: query must come with variant "dpt" and only then, got '
                f"{'one' if query is not None else 'none'} with {config.variant!r}."
            )
        if config.num_actions:
            actions = F.one_hot(actions.long(), config.num_actions).to(states.dtype)
        kinds = (
            self.embed_state(states),
            self.embed_action(actions),
            self.embed_reward(rewards[..., None]),
        )
        x = torch.stack(kinds, dim=2) + self.embed_kind + self.embed_step.weight[:steps, None]
        x = x.flatten(1, 2)
        positions = torch.arange(steps, device=x.device) * 3
        if query is not None:
            first = self.embed_state(query) + self.embed_kind[0] + self.embed_step.weight[-1]
            x = torch.cat([first[:, None], x], dim=1)
            positions = torch.cat([positions.new_zeros(1), positions + 1])
        return x, positions

    def update_target(self) -> None:
        """Updates the slow router; call it after each optimizer step."""
        self.experts.contrast.update(self.experts.task_router)


def action_loss(predicted: Tensor, target: Tensor, num_actions: int) -> Tensor:
    """Returns the imitation loss: cross-entropy of [..., A] logits, or mean squared error of
    actions."""
    if num_actions:
        return F.cross_entropy(predicted.flatten(0, -2), target.long().flatten())
    return F.mse_loss(predicted, target)

"""T2MIR without one of its two kinds of experts, or dense.

Letters: B sequences, L tokens of each, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice
from moe_ops.layers import Experts
from moe_ops.zoo.t2mir import T2MIR, T2MIRConfig
from moe_ops.zoo.t2mir.routers import MomentumContrast, NoisyTopKRouter, TaskRouter

# The last layer's feed-forward part: output, representation, balance and contrastive loss.
Found = tuple[Tensor, Tensor | None, Tensor, Tensor]


@dataclass(frozen=True)
class AblationConfig(T2MIRConfig):
    """Sizes and options, beside those of `T2MIRConfig`.

    Attributes:
        moe: in the last layer: "both" (each half the width), "token", "task", or "none" (dense).
    """

    moe: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("AblationConfig", "moe", self.moe, ("both", "token", "task", "none"))


class TokenLayer(nn.Module):
    """Token-wise experts alone."""

    def __init__(self, config: AblationConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = config.dropout
        self.token_router = NoisyTopKRouter(
            config.hidden_size, config.token_experts, config.token_top_k
        )
        self.token_experts = experts_of(config, config.token_experts)

    def forward(self, x: Tensor, contrastive: bool) -> Found:
        flat = self.norm(x).flatten(0, 1)
        weights, ids, balance = self.token_router(flat)
        y = self.token_experts(flat, weights, ids).view_as(x)
        return F.dropout(y, self.dropout, self.training), None, balance, x.new_zeros(())


class TaskLayer(nn.Module):
    """Task-wise experts alone."""

    def __init__(self, config: AblationConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = config.dropout
        self.task_router = TaskRouter(
            config.hidden_size,
            config.task_experts,
            config.task_top_k,
            routing=config.routing,
            softmax_representation=config.softmax_representation,
        )
        self.task_experts = experts_of(config, config.task_experts)
        self.contrast = MomentumContrast(self.task_router, config.tau)

    def forward(self, x: Tensor, contrastive: bool) -> Found:
        h = self.norm(x)
        weights, ids, representation = self.task_router(h)
        y = self.task_experts(h.flatten(0, 1), weights, ids).view_as(x)
        contrast = x.new_zeros(())
        if contrastive:
            contrast = self.contrast(representation, self.contrast.keys(h))
        y = F.dropout(y, self.dropout, self.training)
        return y, representation, x.new_zeros(()), contrast


class DenseLayer(nn.Module):
    """A dense network, about as wide as the experts that a token uses."""

    def __init__(self, config: AblationConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, 6 * config.hidden_size
        self.norm = nn.LayerNorm(size)
        self.net = nn.Sequential(
            nn.Linear(size, width), nn.GELU(), nn.Linear(width, size), nn.Dropout(config.dropout)
        )

    def forward(self, x: Tensor, contrastive: bool) -> Found:
        return self.net(self.norm(x)), None, x.new_zeros(()), x.new_zeros(())


LAYERS: dict[str, type[nn.Module]] = {"token": TokenLayer, "task": TaskLayer, "none": DenseLayer}


def experts_of(config: AblationConfig, count: int) -> Experts:
    hidden = config.expert_hidden or 2 * config.hidden_size
    return Experts(count, config.hidden_size, hidden, activation="gelu", bias=True)


class Ablation(T2MIR):
    """T2MIR whose last layer is what the config selects."""

    config: AblationConfig

    def __init__(self, config: AblationConfig) -> None:
        super().__init__(config)

    def make_experts(self, config: Any) -> nn.Module:
        if config.moe == "both":
            return super().make_experts(config)
        return LAYERS[config.moe](config)

    def update_target(self) -> None:
        if hasattr(self.experts, "contrast"):
            super().update_target()

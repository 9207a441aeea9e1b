"""Networks that MoFME is compared with: FFN experts, a plain router, and a dense network.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._fields import check_choice
from moe_ops.layers import Experts, TopKRouter
from moe_ops.layers.routing import Routing
from moe_ops.zoo.mofme import MoFME, MoFMEConfig, RestorationTransformer, feed_forward

EXPERTS = ("film", "ffn", "dense")
ROUTERS = ("uncertainty", "plain")


@dataclass(frozen=True)
class RivalConfig(MoFMEConfig):
    """Sizes and options, beside those of `MoFMEConfig`.

    Attributes:
        experts: "film", "ffn" or "dense" (one network, no experts).
        router: "uncertainty" or "plain"; that of "ffn" is plain.
    """

    experts: str = "film"
    router: str = "uncertainty"

    def __post_init__(self) -> None:
        check_choice("RivalConfig", "experts", self.experts, EXPERTS)
        check_choice("RivalConfig", "router", self.router, ROUTERS)


class PlainMoFME(MoFME):
    """MoFME with a plain router of the same weights."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        drawn = self.router
        with torch.random.fork_rng(devices=[]):
            self.router = TopKRouter(
                drawn.hidden_size, drawn.num_experts, drawn.top_k, bias=True, topk_first=True
            )
        self.router.load_state_dict(drawn.state_dict())


class FFNMixture(nn.Module):
    """Mixture y = sum_k w_k FFN_e(norm(x)); the router reads x.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K. dropout: behind the output.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.router = TopKRouter(hidden_size, num_experts, top_k, bias=True, topk_first=True)
        self.experts = Experts(
            num_experts, hidden_size, intermediate_size, activation="gelu", bias=True
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Returns y, shaped like x [..., H], and the routing of its T tokens."""
        flat = x.flatten(0, -2)
        routing = self.router(flat)
        y = self.experts(self.norm(flat), routing.topk_weights, routing.topk_ids)
        return self.dropout(y).view(x.shape), routing


class DenseFFN(nn.Module):
    """Feed-forward network after a norm."""

    def __init__(self, config: RivalConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm = nn.LayerNorm(hidden)
        self.ffn = feed_forward(hidden, config.mlp_ratio * hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.dropout(self.ffn(self.norm(x))), None


class Restoration(RestorationTransformer):
    """The network of `moe_ops.zoo.mofme` with the feed-forward parts that the config selects."""

    config: RivalConfig

    def make_ffn(self, config: RivalConfig) -> nn.Module:
        if config.experts == "dense":
            return DenseFFN(config)
        hidden, dropout = config.hidden_size, config.dropout
        sizes = (hidden, config.mlp_ratio * hidden, config.num_experts, config.top_k)
        if config.experts == "ffn":
            return FFNMixture(*sizes, dropout=dropout)
        if config.router == "plain":
            return PlainMoFME(*sizes, dropout=dropout)
        return super().make_ffn(config)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Routing]]:
        """Returns the restored images, and the routing of each layer that has experts."""
        restored, routing = super().forward(images)
        return restored, [routed for routed in routing if routed is not None]

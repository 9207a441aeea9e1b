"""The Switch Transformer, which THOR is compared with: a router in the place of random experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops.layers import Experts, MoE, TopKRouter
from moe_ops.layers.routing import Routing
from moe_ops.zoo.lm.checkpoint import Entry
from moe_ops.zoo.lm.config import LMConfig
from moe_ops.zoo.lm.losses import OF_LAYERS, Routed, sum_over_layers
from moe_ops.zoo.thor.model import PAD, Thor, ThorConfig, join


@dataclass(frozen=True)
class SwitchConfig(ThorConfig):
    """Sizes and options of THOR, with one pass.

    Attributes:
        balance_coefficient: of the balance loss, summed over layers.
    """

    passes: int = 1
    balance_coefficient: float = 0.01

    def aux_coefficients(self) -> dict[str, float]:
        return {"load_balancing": self.balance_coefficient}


class SwitchLoss(NamedTuple):
    """`ThorLoss` with the balance loss, summed over layers."""

    loss: Tensor
    cross_entropy: Tensor
    consistency: Tensor
    balance: Tensor


class SwitchExperts(MoE):
    """Best expert of a token, times its probability. `routing` is that of the last call."""

    routing: Routing

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        experts = Experts(num_experts, hidden_size, intermediate_size, activation="relu", bias=True)
        super().__init__(TopKRouter(hidden_size, num_experts, 1), experts)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Any:  # type: ignore[override]
        """Returns a tensor shaped like x [B, S, H]; `chosen` is unused."""
        out: Any = super().forward(x, return_routing=True)
        self.routing = Routing(out.router_logits, out.topk_weights, out.topk_ids)
        return out.y


class Switch(Thor):
    """THOR's transformer with `SwitchExperts`."""

    config_class: ClassVar[type[LMConfig]] = SwitchConfig
    config: SwitchConfig

    def make_ffn(self, num_experts: int) -> nn.Module:
        if num_experts == 1:
            return super().make_ffn(num_experts)
        return SwitchExperts(self.config.hidden_size, self.config.intermediate_size, num_experts)

    def loss(  # type: ignore[override]
        self,
        target: Tensor,
        source: Tensor | None = None,
        *,
        experts: tuple[Tensor | None, Tensor | None] | None = None,
        passes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> SwitchLoss:
        """Computes THOR's loss of the passes, plus the balance loss times its coefficient. No
        experts are drawn."""
        found = super().loss(target, source, experts=(None, None), passes=passes)
        count = self.config.passes if passes is None else passes
        if source is not None and not len(self.encoder_layers):
            target, source = join(source, target)[0], None
        balance, name = found.loss.new_zeros(()), "load_balancing"
        for side, tokens in (("encoder", source), ("decoder", target)):
            layers = [
                Routed(f"{side}_layers.{i}.ffn", ffn.router, ffn.routing)
                for i, ffn in self._switches(side)
            ]
            if layers and tokens is not None:
                mask = (tokens != PAD).repeat(count, 1)
                balance = balance + sum_over_layers(name, OF_LAYERS[name], layers, 0, mask)
        total = found.loss + self.config.balance_coefficient * balance
        return SwitchLoss(total, found.cross_entropy, found.consistency, balance)

    def entries(self) -> list[Entry]:
        routers = [
            Entry(f"{side}_layers.{i}.ffn.router.weight", (f"{side}.layers.{i}.router.weight",))
            for side in ("encoder", "decoder")
            for i, _ in self._switches(side)
        ]
        return [*super().entries(), *routers]

    def _switches(self, side: str) -> list[tuple[int, SwitchExperts]]:
        """Returns the layers of a side that have experts, by index."""
        layers = enumerate(self._layers_of(side))
        return [(i, layer.ffn) for i, layer in layers if isinstance(layer.ffn, SwitchExperts)]

"""Random routing, the control of the router."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_ops.zoo.driftmoe.experts import StreamExpert
from moe_ops.zoo.driftmoe.model import DriftMoE, DriftMoEConfig


class RandomRouter(DriftMoE):
    """DriftMoE whose router draws its logits and learns nothing."""

    def __init__(
        self, config: DriftMoEConfig, make_expert: Callable[[int], StreamExpert] | None = None
    ) -> None:
        super().__init__(config, make_expert)
        self.generator = torch.Generator().manual_seed(config.seed)

    def _logits(self, features: Tensor) -> Tensor:
        return torch.randn(1, self.config.experts, generator=self.generator)

    def _router_step(self) -> None:
        self._waiting.clear()

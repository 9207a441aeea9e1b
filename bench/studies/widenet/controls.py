"""Controls of WideNet: shared norms as in ALBERT, a block of each depth, and a dense network.

Letters: T tokens, H hidden size, E experts, L depths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops._fields import check_choice
from moe_ops.layers import Experts, MoEOutput
from moe_ops.zoo.lm.config import LMConfig
from moe_ops.zoo.lm.model import LMOutput
from moe_ops.zoo.widenet import ViTOutput, WideNetConfig, WideNetLM, WideNetViT

SHARINGS = ("own_norms", "shared_norms", "none")


@dataclass(frozen=True)
class ControlConfig(WideNetConfig):
    """Sizes and options, beside those of `WideNetConfig`; with `num_experts` 1 blocks have a dense
    network and no router.

    Attributes:
        sharing: "own_norms", one block with norms of each depth; "shared_norms", one block and one
            pair of norms (as in ALBERT); "none", a block of each depth.
    """

    sharing: str = "own_norms"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ControlConfig", "sharing", self.sharing, SHARINGS)

    def aux_coefficients(self) -> dict[str, float]:
        return super().aux_coefficients() if self.num_experts > 1 else {}


class DenseNetwork(nn.Module):
    """Network of one expert, for every token; maps x [..., H] to its shape."""

    router = None

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | MoEOutput:
        flat = x.reshape(-1, x.shape[-1])
        ones = torch.ones(len(flat), 1, device=x.device)
        y: Tensor = self.experts(flat, ones, torch.zeros_like(ones, dtype=torch.int64))
        y = y.view(x.shape)
        return MoEOutput(y, None, None, None, {}) if return_routing else y


class _Control:
    """Base of both models."""

    config_class: ClassVar[type[LMConfig]] = ControlConfig

    def counts(self, config: ControlConfig) -> tuple[int, int]:
        blocks = config.num_layers if config.sharing == "none" else 1
        return blocks, 1 if config.sharing == "shared_norms" else config.num_layers

    def make_ffn(self, config: ControlConfig) -> nn.Module:
        if config.num_experts > 1:
            return super().make_ffn(config)
        hidden, width = config.hidden_size, config.intermediate_size
        return DenseNetwork(Experts(1, hidden, width, activation="gelu_tanh", bias=True))

    def forward(self, inputs: Tensor, **options: Any) -> Any:
        """Computes the output of the base; a dense network has no routing."""
        out = super().forward(inputs, **options)
        if not isinstance(out, (LMOutput, ViTOutput)):
            return out
        return out._replace(routing=[r for r in out.routing if r.router is not None])


class ControlLM(_Control, WideNetLM):
    """The language model."""


class ControlViT(_Control, WideNetViT):
    """The classifier of images."""


def build(config: ControlConfig) -> ControlLM | ControlViT:
    """Builds the model of a config."""
    return ControlLM(config) if config.trunk == "language" else ControlViT(config)

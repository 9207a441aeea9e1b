"""An override of torchtitan for CPUs, on which FlexAttention has no backward."""

from __future__ import annotations

from torchtitan.config import override
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention


@override(target=FlexAttention.Config, description="Causal attention, across documents.")
def causal(cfg: FlexAttention.Config) -> ScaledDotProductAttention.Config:
    return ScaledDotProductAttention.Config(sharding_config=cfg.sharding_config)

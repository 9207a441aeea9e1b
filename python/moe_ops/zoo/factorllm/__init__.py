"""FactorLLM: the networks of a dense model cut into slices, of which a token uses some.

Source: Zhao et al. 2024 (FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language
Models, arXiv 2408.11855).
"""

from .model import (
    ROUTER_TRAINING,
    FactorLLM,
    FactorLLMConfig,
    SliceRouter,
    nearest_slices,
    route_loss,
    slice_balance_loss,
)

__all__ = [
    "ROUTER_TRAINING",
    "FactorLLM",
    "FactorLLMConfig",
    "SliceRouter",
    "nearest_slices",
    "route_loss",
    "slice_balance_loss",
]

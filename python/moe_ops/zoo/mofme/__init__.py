"""MoFME: images restored by experts that are modulations of one shared network.

    model = zoo.create("mofme")                                # or preset="e8", experts="ffn"
    restored, routing = model(images)

Source: Zhang et al. 2024 (Efficient Deweather Mixture-of-Experts with Uncertainty-aware
Feature-wise Linear Modulation, AAAI, arXiv 2312.16610).
"""

from .layers import FiLMExperts, MoFME, UncertaintyRouter
from .model import MoFMEConfig, RestorationTransformer

__all__ = ["FiLMExperts", "MoFME", "MoFMEConfig", "RestorationTransformer", "UncertaintyRouter"]

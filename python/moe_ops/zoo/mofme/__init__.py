"""MoFME: images restored by experts that are modulations of one shared network.

    model = zoo.create("mofme")                                # or preset="e8", experts="ffn"
    restored, routing = model(images)

    python -m moe_ops.zoo.mofme --folder runs/mofme

Source: Zhang et al. 2024 (Efficient Deweather Mixture-of-Experts with Uncertainty-aware
Feature-wise Linear Modulation, AAAI, arXiv 2312.16610).
"""

from .._images import psnr, ssim
from .layers import FiLMExperts, MoFME, UncertaintyRouter
from .model import MoFMEConfig, RestorationTransformer
from .training import evaluate, fit
from .weather import (
    WEATHER,
    Degraded,
    add_haze,
    add_rain,
    add_snow,
    crops,
    degrade,
    load_photos,
    read_photo,
)

__all__ = [
    "WEATHER",
    "Degraded",
    "FiLMExperts",
    "MoFME",
    "MoFMEConfig",
    "RestorationTransformer",
    "UncertaintyRouter",
    "add_haze",
    "add_rain",
    "add_snow",
    "crops",
    "degrade",
    "evaluate",
    "fit",
    "load_photos",
    "psnr",
    "read_photo",
    "ssim",
]

"""Dynamic-DINO: an open-vocabulary detector whose decoder's networks become experts.

    dense = zoo.create("dynamicdino", num_copies=0)     # train it, or take one of transformers
    sparse = dense.with_experts(num_copies=4, num_slices=2)

    python -m moe_ops.zoo.dynamicdino --folder runs/dynamicdino

Source: Lu et al. 2025 (Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time
Open-Vocabulary Object Detection, arXiv 2507.17436); Liu et al. 2023 (Grounding DINO, arXiv
2303.05499).
"""

from .metrics import Found, average_precision, detect
from .model import (
    DinoLoss,
    DynamicDino,
    DynamicDinoConfig,
    co_selection,
    freeze,
    moe_tuning,
    pairs_kept,
)
from .shapes import Scenes, draw_scenes
from .training import fit, judge

__all__ = [
    "DinoLoss",
    "DynamicDino",
    "DynamicDinoConfig",
    "Found",
    "Scenes",
    "average_precision",
    "co_selection",
    "detect",
    "draw_scenes",
    "fit",
    "freeze",
    "judge",
    "moe_tuning",
    "pairs_kept",
]

"""Dynamic-DINO: an open-vocabulary detector whose decoder's networks become experts.

    dense = zoo.create("dynamicdino", num_copies=0)     # train it, or take one of transformers
    sparse = dense.with_experts(num_copies=4, num_slices=2)

Source: Lu et al. 2025 (Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time
Open-Vocabulary Object Detection, arXiv 2507.17436); Liu et al. 2023 (Grounding DINO, arXiv
2303.05499).
"""

from .model import DynamicDino, DynamicDinoConfig, moe_tuning

__all__ = ["DynamicDino", "DynamicDinoConfig", "moe_tuning"]

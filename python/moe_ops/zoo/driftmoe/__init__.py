"""DriftMoE: a router network over trees that learn online, one example at a time.

Example:
    model = zoo.create_model("driftmoe", preset="moe_data", num_features=24, num_classes=10)
    model.learn_one(x, y)

A model has `predict_one`, `predict_proba_one` and `learn_one`, like classifiers of river, and
experts are any objects with these methods. Trees come from river (the extra `streams`); a model
with custom experts runs without it.

Source: Aspis et al. 2025 (DriftMoE: A Mixture of Experts Approach to Handle Concept Drifts, ECML
PKDD workshops, arXiv 2507.18464).
"""

from .experts import cooperative_labels
from .model import DriftMoE, DriftMoEConfig, StreamRouter

__all__ = ["DriftMoE", "DriftMoEConfig", "StreamRouter", "cooperative_labels"]

"""Plots of mixture-of-experts models: loss, expert load, experts of each token, statistics of a
trained model's experts, plans of expert parallelism, and image grids.

Every function returns a matplotlib Figure and, given `path`, also saves it. They draw on the Agg
canvas without pyplot: no window, no global state. Needs matplotlib: ``pip install
"torch-moe-ops[viz]"``.
"""

from __future__ import annotations

from .images import plot_images
from .models import plot_expert_scores, plot_largest_outputs
from .plan import plot_plan
from .training import plot_expert_load, plot_loss, plot_token_experts

__all__ = [
    "plot_expert_load",
    "plot_expert_scores",
    "plot_images",
    "plot_largest_outputs",
    "plot_loss",
    "plot_plan",
    "plot_token_experts",
]

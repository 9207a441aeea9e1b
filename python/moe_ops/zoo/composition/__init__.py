"""Composition of Experts: whole language models behind a router of categories.

    composition = zoo.create_model("composition")
    composition.assign(scores, counts, budget=...)          # category -> model, by a MILP
    composition.generate(prompts, 20, pool, embed)          # models are loaded as they are needed

Source: Jain et al. 2024 (Composition of Experts: A Modular Compound AI System Leveraging Large
Language Models, arXiv 2412.01868).
"""

from .assignment import Assignment, assign
from .model import Composition, CompositionConfig, Routed
from .router import CategoryRouter, choose_threshold, propagate_labels
from .serving import ExpertPool, PoolCounts

__all__ = [
    "Assignment",
    "CategoryRouter",
    "Composition",
    "CompositionConfig",
    "ExpertPool",
    "PoolCounts",
    "Routed",
    "assign",
    "choose_threshold",
    "propagate_labels",
]

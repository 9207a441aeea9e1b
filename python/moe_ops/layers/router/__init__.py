"""Routers, one file per routing method.

Importing this package registers the kinds that `RouterConfig` builds.
"""

from __future__ import annotations

from .base import Router
from .capacity import CapacityMixin, CapacityRouter, drop_over_capacity
from .expert_choice import ExpertChoiceRouter
from .gate import GateRouter
from .hash import HashRouter, hash_table
from .relu import L1Coefficient, ReLURouter, relu_router_loss
from .sparsemixer import SparseMixerRouter, sparsemixer
from .topk import TopKRouter
from .topp import TopPRouter

__all__ = [
    "CapacityMixin",
    "CapacityRouter",
    "ExpertChoiceRouter",
    "GateRouter",
    "HashRouter",
    "L1Coefficient",
    "ReLURouter",
    "Router",
    "SparseMixerRouter",
    "TopKRouter",
    "TopPRouter",
    "drop_over_capacity",
    "hash_table",
    "relu_router_loss",
    "sparsemixer",
]

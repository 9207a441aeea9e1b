"""Routers, one file per routing method.

Importing this package registers the kinds that `RouterConfig` builds.
"""

from __future__ import annotations

from .base import Router
from .capacity import CapacityMixin, CapacityRouter
from .expert_choice import ExpertChoiceRouter
from .gate import GateRouter
from .hash import HashRouter
from .relu import L1Coefficient, ReLURouter, relu_router_loss
from .sparsemixer import SparseMixerRouter
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
    "relu_router_loss",
]

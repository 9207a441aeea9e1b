"""Routers: a file for each way of choosing experts.

Importing this package registers the kinds that `Router(..., kind=...)` knows.
"""

from __future__ import annotations

from ..routing import Routing
from .base import Router
from .expert_choice import ExpertChoiceRouter
from .gate import GateRouter
from .sparsemixer import SparseMixerRouter, sparsemixer
from .topk import TopKRouter
from .topp import TopPRouter

RouterOutput = Routing  # Its name until there was one type for the routing of a call.

__all__ = [
    "ExpertChoiceRouter",
    "GateRouter",
    "Router",
    "RouterOutput",
    "SparseMixerRouter",
    "TopKRouter",
    "TopPRouter",
    "sparsemixer",
]

"""Looking into trained mixture-of-experts models, and changing them.

`route_as` routes otherwise for a while; `SelfContrast` contrasts a model with itself so routed.
They work for the layers of `moe_ops.layers`, the language models of the zoo, and the models of
transformers whose experts go through its experts interface.
"""

from __future__ import annotations

from .route_as import given, only, random, rank, route_as, top_k
from .routed_layers import RoutedLayer, routed_layers
from .self_contrast import SelfContrast, contrast

__all__ = [
    "RoutedLayer",
    "SelfContrast",
    "contrast",
    "given",
    "only",
    "random",
    "rank",
    "route_as",
    "routed_layers",
    "top_k",
]

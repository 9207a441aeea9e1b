"""Views of a module's expert weights, and a registry of module types, shared by packing and
quantization.

Layers and integrations import from here; nothing here imports a layer.
"""

from __future__ import annotations

from .registry import (
    ExpertsHook,
    hooks,
    hooks_for,
    is_quantized,
    register_hook,
    replace_module,
)
from .view import ExpertInputs, ExpertWeights

__all__ = [
    "ExpertInputs",
    "ExpertWeights",
    "ExpertsHook",
    "hooks",
    "hooks_for",
    "is_quantized",
    "register_hook",
    "replace_module",
]

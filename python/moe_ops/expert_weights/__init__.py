"""The weights of a module's experts, whatever module holds them: one view and one registry of the
kinds of modules, which packing and quantization share.

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

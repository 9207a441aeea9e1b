"""Packed copies of expert weights, as users make and drop them; :mod:`moe_ops` has the same names.

:mod:`moe_ops.expert_weights.packing` says what a copy is and when it goes.
"""

from __future__ import annotations

from moe_ops.expert_weights.packing import (
    packed_bytes,
    prepack,
    prepack_settings,
    prepacking,
    unpack,
)
from moe_ops.memory import available_memory

__all__ = [
    "available_memory",
    "packed_bytes",
    "prepack",
    "prepack_settings",
    "prepacking",
    "unpack",
]

"""Deprecated, and kept for pickles: `GateRouter` is in `moe_ops.layers`."""

import warnings

from .router import GateRouter as GateRouter

warnings.warn(
    "moe_ops.layers.gates is deprecated: import from moe_ops.layers.",
    DeprecationWarning,
    stacklevel=2,
)

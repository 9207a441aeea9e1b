"""Deprecated, and kept for pickles: use `moe_ops.layers`, and `recompute` and `record` there."""

import warnings

from .recompute import RoutingLog as RoutingLog
from .recompute import in_backward as in_backward
from .record import RoutingChoice as RoutingChoice
from .record import RoutingRecord as RoutingRecord
from .record import record_routing as record_routing
from .record import replay_routing as replay_routing

warnings.warn(
    "moe_ops.layers.replay is deprecated: import from moe_ops.layers.",
    DeprecationWarning,
    stacklevel=2,
)

"""Statistics of a multi-task model's trace: experts with all-zero outputs, scales, gates.

Letters: E experts, M mixtures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.zoo.home.layers import Trace


def zero_fraction(trace: Trace) -> Tensor:
    """Returns [E]: fraction of an expert's outputs that are exactly 0."""
    return (trace.outputs == 0).float().mean((0, 2))


def scale_ratio(trace: Trace) -> float:
    """Returns the largest over the smallest standard deviation of an expert's outputs."""
    std = trace.outputs.float().std((0, 2))
    return float(std.max() / std.min().clamp(min=torch.finfo(std.dtype).tiny))


def gate_entropy(trace: Trace) -> Tensor:
    """Returns [M]: mean entropy of each gate in nats; a sigmoid gate's weight is used directly."""
    return -torch.special.xlogy(trace.weights, trace.weights).sum(-1).mean(0)

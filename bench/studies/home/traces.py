"""What a trace of a multi-task model tells: experts that are all zeros, scales, gates.

Letters: E experts, M mixtures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.zoo.home.layers import Trace


def zero_fraction(trace: Trace) -> Tensor:
    """[E]: share of an expert's outputs that are exactly 0."""
    return (trace.outputs == 0).float().mean((0, 2))


def scale_ratio(trace: Trace) -> float:
    """Largest over smallest standard deviation of an expert's outputs."""
    std = trace.outputs.float().std((0, 2))
    return float(std.max() / std.min().clamp(min=torch.finfo(std.dtype).tiny))


def gate_entropy(trace: Trace) -> Tensor:
    """[M]: mean entropy of each gate in nats; a sigmoid gate counts its weight as it is."""
    return -torch.special.xlogy(trace.weights, trace.weights).sum(-1).mean(0)

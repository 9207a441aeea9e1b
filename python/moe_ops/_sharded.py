"""Weights that are spread over processes, and how messages name a weight.

FSDP2, tensor and expert parallelism of torch make DTensors of parameters. What reads or rewrites
whole weights refuses them: each process has a part.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    # A process that has not imported DTensor has none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_whole(op: str, name: str, tensor: Any, advice: str) -> None:
    """Raises ValueError for a DTensor."""
    if is_sharded(tensor):
        placements = ", ".join(repr(p) for p in tensor.placements)
        count = tensor.device_mesh.size()
        raise ValueError(
            f"{op}: {name} must be a plain tensor, got a DTensor ({placements} on a mesh of "
            f"{count} process{'es' if count > 1 else ''}); {advice}."
        )


def name_of(module: nn.Module, tensor: Tensor, prefix: str = "") -> str | None:
    """The name of the parameter or buffer that `tensor` is, or is a view of."""
    base = tensor._base
    for name, own in (*module.named_parameters(), *module.named_buffers()):
        if own is tensor or own is base:
            return f"{prefix}.{name}" if prefix else name
    return None

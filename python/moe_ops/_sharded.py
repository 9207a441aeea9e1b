"""Sharded weights, and names of weights in messages.

FSDP2, tensor and expert parallelism of torch turn parameters into DTensors. Experts support those
for which a process reads its own experts (`moe_ops.parallel.shard_experts` defines which).
Functions that read or rewrite whole weights reject all others, of which each process has a part.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Any) -> bool:
    if type(tensor) in _PLAIN:
        return False
    # A process that has not imported DTensor has none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Any:
    """Returns this process's part of a DTensor, with gradients; returns other values unchanged."""
    if type(tensor) in _PLAIN:  # Decoding one token notices a second call.
        return tensor
    return tensor.to_local() if is_sharded(tensor) else tensor


def has_own_experts(bank: nn.Module, weight: Any) -> bool:
    """Returns whether calls run this process's part of a weight directly: experts of
    `moe_ops.parallel.shard_experts` and of transformers' expert parallelism. With FSDP2 in
    addition, which adds a mesh dimension, calls run gathered weights."""
    parallel = getattr(bank, "dispatcher", None) or getattr(bank, "_is_expert_parallel", False)
    return bool(parallel) and is_sharded(weight) and weight.device_mesh.ndim == 1


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
    """Returns the name of the parameter or buffer that `tensor` is, or is a view of."""
    base = tensor._base
    for name, own in (*module.named_parameters(), *module.named_buffers()):
        if own is tensor or own is base:
            return f"{prefix}.{name}" if prefix else name
    return None

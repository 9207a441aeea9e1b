"""Comparison of what the ranks of a group pass to a call that they must make alike."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# Elements of a tensor that its checksum reads.
_SAMPLES = 4096


def check_agreement(call: str, facts: Callable[[], Mapping[str, str]], group: ProcessGroup) -> None:
    """Raises ValueError on every rank if the facts of a rank differ from those of rank 0.

    Args:
        call: name of the call, for the error.
        facts: returns name -> value in words, in any order; not called where nothing is sent.
        group: its ranks exchange the facts, but not with the backend "fake".
    """
    if group.size() == 1 or dist.get_backend(group) == "fake":
        return
    table: list[Any] = [None] * group.size()
    dist.all_gather_object(table, dict(facts()), group=group)
    for rank, other in enumerate(table):
        for name in [*table[0], *other]:
            first, found = table[0].get(name, "none"), other.get(name, "none")
            if first != found:
                raise ValueError(
                    f"{call}: {name} must be equal on all ranks, got {first} on rank 0 and {found} "
                    f"on rank {rank} of the group."
                )


def weight_facts(module: nn.Module) -> dict[str, str]:
    """Returns shape, dtype and a checksum of each parameter and buffer of a module. The checksum is
    of at most 4096 elements, and left out on the meta device."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: _described(tensor) for name, tensor in tensors.items()}


def _described(tensor: Tensor) -> str:
    # Another rank has another part of a sharded tensor.
    local = type(tensor) in (Tensor, nn.Parameter)
    words = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.is_meta or not local or tensor.numel() == 0:
        return words
    values = tensor.detach().reshape(-1)
    values = values[:: -(-values.numel() // _SAMPLES)].cpu().contiguous()
    return f"{words} with checksum {zlib.crc32(values.view(torch.uint8).numpy().tobytes()):08x}"

"""Checkpoints of experts that are not at the places of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from .banks import banks_of, places_of, sharding_of, tensors_of


@contextmanager
def canonical_expert_order(model: nn.Module, state: dict[str, Any]) -> Iterator[None]:
    """While the context is open, torch.distributed.checkpoint writes and reads a state in the order
    of experts, each once, wherever they are: files fit other placements, other numbers of ranks,
    and a process without any.

    Example:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        with in_expert_order(model, state):
            dcp.save(state, checkpoint_id="checkpoint")  # or dcp.load

    Args:
        model: that the state is of.
        state: of `get_state_dict` or `state_dict`, nested as may be: parameters by name, and what
            an optimizer keeps of each. Changed in place for the time of the context; what is read
            goes into its tensors.
    """
    owners = {
        f"{name}.{key}" if name else key: bank
        for name, bank in banks_of(model)
        if bank.sharding is not None and not bank.sharding.placement.is_identity
        for key, _ in tensors_of(bank)
    }
    found: list[tuple[dict[str, Any], str, DTensor, Any]] = []

    def visit(node: dict[str, Any], owner: Any) -> None:
        for key, value in node.items():
            bank = owners.get(key, owner)
            if isinstance(value, dict):
                visit(value, bank)
            elif isinstance(value, DTensor) and bank is not None and value.numel() > 1:
                found.append((node, key, value, bank))

    visit(state, None)
    for node, key, value, bank in found:
        node[key] = _by_expert(value, bank)
    try:
        yield
    finally:
        for node, key, value, _ in found:
            node[key] = value


class _ByExpert(Tensor):
    """The rows that this rank has of a tensor, as a part of one in the order of experts: what
    torch.distributed.checkpoint asks of a tensor (the three methods that DTensor has as well).

    whole: its size. rows: by its offsets in that, each run of experts that are here in order.
    written: offsets of the runs that this rank writes, others being written where an expert has its
    first place.
    """

    whole: torch.Size
    rows: dict[torch.Size, Tensor]
    written: list[torch.Size]

    def size(self, dim: int | None = None) -> Any:
        return self.whole if dim is None else self.whole[dim]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, self.rows[offsets].shape),
                    properties=TensorProperties.create_from_tensor(self.rows[offsets]),
                    size=self.whole,
                ),
            )
            for offsets in self.written
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, rows.shape) for offsets, rows in self.rows.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.rows[index.offset]


def _by_expert(tensor: DTensor, bank: Any) -> _ByExpert:
    placement, local = bank.sharding.placement, tensor.to_local().detach()
    places, first = places_of(bank, tensor), placement.first_places
    # FSDP2 may shard the second dimension instead of the first.
    others = [0] * (local.ndim - 1)
    mesh_dim = sharding_of(tensor, 1)
    if mesh_dim is not None:
        share = -(-tensor.shape[1] // tensor.device_mesh.size(mesh_dim))
        others[0] = share * tensor.device_mesh.get_local_rank(mesh_dim)
    result = local.as_subclass(_ByExpert)
    result.whole = torch.Size((placement.num_experts, *tensor.shape[1:]))
    result.rows, result.written = {}, []
    start = 0
    for row, place in enumerate(places):
        expert, end = placement.physical[place], row + 1
        if end < len(places) and placement.physical[place + 1] == expert + 1:
            if (first[expert] == place) == (first[expert + 1] == place + 1):
                continue
        offsets = torch.Size((expert - (row - start), *others))
        result.rows[offsets] = local[start:end]
        if first[expert] == place:
            result.written.append(offsets)
        start = end
    return result

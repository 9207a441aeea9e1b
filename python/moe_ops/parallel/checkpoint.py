"""Checkpoints of experts whose placement is not the identity."""

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
    """Makes torch.distributed.checkpoint write and read a state in the order of experts, each once,
    while the context is open. Files then fit other placements, other numbers of ranks, and a single
    process.

    Example:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        with canonical_expert_order(model, state):
            dcp.save(state, checkpoint_id="checkpoint")  # or dcp.load

    Args:
        model: model of the state.
        state: from `get_state_dict` or `state_dict`, with any nesting: parameters by name, and
            optimizer state of each. Modified in place while the context is open; loaded values are
            written to its tensors.
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
    """This rank's rows of a tensor as a shard of a tensor in the order of experts, with the three
    methods that torch.distributed.checkpoint calls (which DTensor has too).

    whole: its size.
    rows: each contiguous run of local experts, by its offsets in the whole tensor.
    written: offsets of the runs that this rank writes; the rank of an expert's first physical
    expert writes it.
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

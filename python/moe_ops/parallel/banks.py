"""Sharded experts: the rows of their tensors on each rank.

Letters: E experts, P physical experts, n ranks of expert parallelism (EP).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_ops.expert_weights.packing import invalidate
from moe_ops.layers import Experts
from moe_ops.quant import QuantizedExperts

from .comm import sum_over_group
from .placement import ExpertPlacement
from .registry import make_dispatcher

Bank = Experts | QuantizedExperts


def banks_of(model: nn.Module) -> Iterator[tuple[str, Bank]]:
    for name, module in model.named_modules():
        if isinstance(module, Experts | QuantizedExperts):
            yield name, module


def tensors_of(bank: Bank) -> list[tuple[str, Tensor]]:
    """Returns the tensors that have a row for each expert."""
    tensors = [*bank.named_parameters(recurse=False), *bank.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in tensors if name != "x_scale"]


def sharding_of(tensor: DTensor, dim: int) -> int | None:
    """Returns the mesh dimension over which FSDP2 shards a dimension of this rank's experts, or
    None. Expert parallelism is the last mesh dimension."""
    # One of torch's two kinds of sharding is not a Shard.
    dims = [getattr(how, "dim", None) for how in tensor.placements[:-1]]
    return dims.index(dim) if dim in dims else None


def places_of(bank: Bank, tensor: DTensor) -> range:
    """Returns the physical experts whose rows of a tensor this rank has."""
    placement, mesh_dim = bank.sharding.placement, sharding_of(tensor, 0)
    first, num = bank.sharding.ep_mesh.get_local_rank() * placement.per_rank, placement.per_rank
    if mesh_dim is not None:
        share = -(-num // tensor.device_mesh.size(mesh_dim))
        skipped = min(share * tensor.device_mesh.get_local_rank(mesh_dim), num)
        first, num = first + skipped, min(share, num - skipped)
    return range(first, first + num)


@dataclass(frozen=True)
class ExpertSharding:
    """Sharding of a module of experts, for sharding another one in the same way.

    ep_mesh: see `shard_experts`.
    options: of `make_dispatcher`.
    placement: of these experts.
    """

    ep_mesh: DeviceMesh
    options: Mapping[str, Any]
    placement: ExpertPlacement

    def shard(self, bank: Bank) -> None:
        """Keeps only this rank's experts of an unsharded module. With another number of experts
        than in the placement, these are contiguous."""
        sharding = self._of(bank.num_experts)
        rows = list(sharding.placement.local(self.ep_mesh.get_local_rank()))
        sharding._connect(bank)
        for name, tensor in tensors_of(bank):
            self._put(bank, name, tensor.detach()[rows], tensor.requires_grad)

    def adopt(self, bank: Bank) -> None:
        """Converts a module with only this rank's experts to a sharded module of all experts."""
        self._connect(bank)
        for name, tensor in tensors_of(bank):
            self._put(bank, name, tensor.detach(), tensor.requires_grad)

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns all rows of a sharded tensor, one per expert, on every rank; returns other values
        unchanged."""
        if not isinstance(tensor, DTensor) or tensor.device_mesh != self.ep_mesh:
            return tensor
        whole: Tensor = tensor.full_tensor().detach()
        return whole if self.placement.is_identity else whole[list(self.placement.first_places)]

    def tie_replicas(self, weights: tuple[Tensor | None, ...]) -> Any:
        """Returns this rank's weights, [P / n, ...] each, such that gradients are summed over all
        physical experts of an expert, which keeps these equal."""
        some = any(w is not None and w.requires_grad for w in weights)
        if not (some and torch.is_grad_enabled() and self.placement.has_replicas):
            return weights
        present = iter(_TieReplicas.apply(self, *(w for w in weights if w is not None)))
        return tuple(None if w is None else next(present) for w in weights)

    def _of(self, num_experts: int) -> ExpertSharding:
        """Returns this sharding for the given number of experts."""
        if num_experts == self.placement.num_experts:
            return self
        if num_experts % self.ep_mesh.size():
            raise ValueError(
                f"shard_experts: the {self.ep_mesh.size()} ranks of ep_mesh must divide the "
                f"experts of each bank, got {num_experts}."
            )
        placement = ExpertPlacement.contiguous(num_experts, self.ep_mesh.size())
        return replace(self, placement=placement)

    def _put(self, bank: Bank, name: str, own: Tensor, requires_grad: bool) -> None:
        sharded = DTensor.from_local(own, self.ep_mesh, [Shard(0)], run_check=False)
        if name in bank._buffers:
            bank._buffers[name] = sharded
        else:
            setattr(bank, name, nn.Parameter(sharded, requires_grad=requires_grad))

    def _connect(self, bank: Bank) -> None:
        num_experts, top_k = self.placement.num_experts, self.options.get("top_k")
        options = {**self.options, "top_k": top_k and min(top_k, num_experts)}
        bank.dispatcher = make_dispatcher(
            self.ep_mesh, num_experts, placement=self.placement, **options
        )
        bank.num_experts = num_experts
        set_sharding(bank, self)


# Modules whose gradients have rows for replicas.
with_replicas: weakref.WeakSet[Bank] = weakref.WeakSet()


def set_sharding(bank: Bank, sharding: ExpertSharding) -> None:
    """Sets the sharding of a module of experts."""
    bank.sharding = sharding
    with_replicas.discard(bank)
    if sharding.placement.has_replicas:
        with_replicas.add(bank)
    invalidate(bank)


class _TieReplicas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sharding: ExpertSharding, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.sharding = sharding
        ctx.set_materialize_grads(False)
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Runs one all-reduce with a row for each replicated expert."""
        placement, mesh = ctx.sharding.placement, ctx.sharding.ep_mesh
        several = [e for e, copies in enumerate(placement.copies) if copies > 1]
        local = placement.local(mesh.get_local_rank())
        here = [row for row, expert in enumerate(local) if expert in several]
        there = [several.index(local[row]) for row in here]
        found = [g for g in grads if g is not None]
        if not found:
            return None, *grads
        rows = torch.cat([g[here].flatten(1) for g in found], 1)
        total = rows.new_zeros(len(several), rows.shape[1])
        total[there] = rows
        total = sum_over_group(total, mesh.get_group())[there]
        parts = iter(total.split([g[0].numel() for g in found], 1))
        results: list[Tensor | None] = [None]
        for g in grads:
            if g is not None:
                part, g = next(parts), g.clone()
                g[here] = part.view(-1, *g.shape[1:])
            results.append(g)
        return tuple(results)

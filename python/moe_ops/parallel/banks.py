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

from .comm import all_to_all_rows
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
        found = [g for g in grads if g is not None]
        if not found:
            return None, *grads
        placement, mesh = ctx.sharding.placement, ctx.sharding.ep_mesh
        here = [
            row
            for row, expert in enumerate(placement.local(mesh.get_local_rank()))
            if placement.copies[expert] > 1
        ]
        rows = torch.cat([g[here].flatten(1) for g in found], 1)
        total = _sum_of_copies(rows, here, placement, mesh)
        parts = iter(total.split([g[0].numel() for g in found], 1))
        results: list[Tensor | None] = [None]
        for g in grads:
            if g is not None:
                part, g = next(parts), g.clone()
                g[here] = part.view(-1, *g.shape[1:])
            results.append(g)
        return tuple(results)


def _sum_of_copies(
    rows: Tensor, here: list[int], placement: ExpertPlacement, mesh: DeviceMesh
) -> Tensor:
    """Returns the sum of each row [R, F] over all copies of its expert, with one all-to-all in
    which ranks send rows only to other ranks that have the expert. All ranks add in the order of
    physical experts, so the sums of an expert are bitwise identical.

    Args:
        here: the physical experts of the rows, counted from the first one of this rank.
    """
    rank, n = mesh.get_local_rank(), mesh.size()
    experts = [placement.local(r) for r in range(n)]
    mine = [experts[rank][row] for row in here]
    away = [[i for i, e in enumerate(mine) if r != rank and e in experts[r]] for r in range(n)]
    # Experts of the rows of each rank that this one also has, its own rows among them.
    known = [[e for e in experts[r] if e in mine] for r in range(n)]
    recv = [0 if r == rank else len(known[r]) for r in range(n)]
    send = [len(indices) for indices in away]
    sent = rows[[i for indices in away for i in indices]]
    received = all_to_all_rows(sent, recv, send, mesh.get_group())
    before, after = received.tensor_split([sum(recv[:rank])])
    copies = torch.cat([before, rows, after, rows.new_zeros(1, rows.shape[1])])
    order = [e for part in known for e in part]
    lines = [[i for i, e in enumerate(order) if e == expert] for expert in mine]
    total = torch.zeros_like(rows)
    for nth in range(max(placement.copies)):  # The last row of `copies` is zero.
        total = total + copies[[line[nth] if nth < len(line) else -1 for line in lines]]
    return total

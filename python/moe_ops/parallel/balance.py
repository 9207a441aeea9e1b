"""Rebalancing of experts in training: new placements from expert loads, moved with few collectives.

Letters: E experts, P physical experts, n ranks, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe_ops.layers import ExpertLoadStats

from .banks import Bank, banks_of, places_of, set_sharding, sharding_of, tensors_of
from .comm import all_to_all_rows
from .placement import ExpertPlacement


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `ExpertPlacement.balanced` for several layers, with the interface of the EPLB
    function of this name.

    Args:
        weight: [L, E] loads.
        num_replicas: P.
        num_groups, num_nodes: see `ExpertPlacement.balanced`.
        num_gpus: n.

    Returns:
        phy2log: [L, P] int64, the expert of each physical expert.
        log2phy: [L, E, X] int64, the physical experts of each expert in order, padded with -1; X is
        the largest number per expert.
        logcnt: [L, E] int64, the number of physical experts of each expert.

    Raises:
        ValueError: see `ExpertPlacement.balanced`. A rank never has an expert twice, so P <= E * n.

    Source: the interface of https://github.com/deepseek-ai/EPLB.
    """
    num_experts = weight.shape[1]
    layers = [
        ExpertPlacement.balanced(
            load, num_gpus, num_replicas, num_groups=num_groups, num_nodes=num_nodes
        )
        for load in weight.double().cpu()
    ]
    phy2log = torch.tensor([layer.physical for layer in layers], dtype=torch.int64)
    logcnt = torch.tensor([layer.copies for layer in layers], dtype=torch.int64)
    phy2log = phy2log.reshape(len(layers), num_replicas)
    logcnt = logcnt.reshape(len(layers), num_experts)
    most = int(logcnt.max()) if layers else 1
    log2phy = torch.full((len(layers), num_experts, most), -1, dtype=torch.int64)
    for line, layer in zip(log2phy, layers, strict=True):
        for expert in range(num_experts):
            places = [p for p, other in enumerate(layer.physical) if other == expert]
            line[expert, : len(places)] = torch.tensor(places)
    return phy2log, log2phy, logcnt


def plan_placements(
    model: nn.Module,
    stats: ExpertLoadStats,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> dict[str, ExpertPlacement]:
    """Plans a placement for each module of experts from its load, close to the current placement.

    Keeps the current placement if no other is better (on one machine).

    Args:
        model: a model with experts sharded by `shard_experts`.
        stats: of all ranks (`ExpertLoadStats.all_reduce`), so that all ranks plan equal placements;
            its layers are the names of experts' modules, or of the layers that contain them.
        num_groups, num_nodes: see `ExpertPlacement.balanced`.

    Returns:
        Placements by the names of the experts' modules, for `move_experts`.

    Raises:
        ValueError: no sharded experts, or experts whose layer is not in the statistics.
    """
    found = {}
    for name, bank in _sharded("plan_placements", model).items():
        layer = next((key for key in (name, name.rpartition(".")[0]) if key in stats.layers), None)
        if layer is None:
            raise ValueError(
                f"plan_placements: stats must have counts of {name or 'the bank'}, or of the "
                f"layer that holds it, got layers {stats.layers}."
            )
        old = bank.sharding.placement
        groups: dict[str, int] = {"num_groups": num_groups, "num_nodes": num_nodes}
        load = stats.tokens_per_expert(layer)
        new = ExpertPlacement.balanced(load, old.num_ranks, old.num_physical, **groups)
        better = num_nodes > 1 or new.max_violation(load) < old.max_violation(load)
        found[name] = new.near(old, num_nodes) if better else old
    return found


@torch.no_grad()
def move_experts(
    model: nn.Module,
    optimizer: Optimizer | None,
    placement: ExpertPlacement | Mapping[str, ExpertPlacement],
) -> int:
    """Moves experts to other ranks between two steps, in place.

    It moves parameters, their gradients, buffers and optimizer state. Outputs and further training
    equal those of the original model, up to the order of sums. Parameters remain the same objects
    (DTensors, also of FSDP2), and only rows that move are sent: one all-to-all per module of
    experts, two if FSDP2 shards its experts.

    Example:
        stats.all_reduce()
        move_experts(model, optimizer, plan_placements(model, stats))

    Args:
        model: a model with experts sharded by `shard_experts`. All ranks of their groups must call
            this together.
        optimizer: of the model; None for inference.
        placement: for all experts, or by the names of experts' modules in the model, others
            unchanged. The number of physical experts is fixed by `shard_experts`.

    Returns:
        The number of physical experts that were overwritten.

    Raises:
        ValueError: no sharded experts, an unknown name, an incompatible placement, a dispatcher
            without `set_placement`, or optimizer state that is neither a number nor sharded like
            its parameter. Nothing was moved then.
    """
    banks = _sharded("move_experts", model)
    wanted = (
        dict.fromkeys(banks, placement) if isinstance(placement, ExpertPlacement) else placement
    )
    for name in wanted:
        if name not in banks:
            raise ValueError(
                f"move_experts: placement must be for banks of the model ({', '.join(banks)}), got "
                f"one for {name!r}."
            )
    plans = []
    for name, new in wanted.items():
        bank = banks[name]
        if isinstance(bank, FSDPModule):
            bank.reshard()
        _check_placement(name or "the bank", bank, new)
        tensors = _rows_of(name or "the bank", bank, optimizer)
        moves = bank.sharding.placement.moves(new)
        plans.append((bank, new, [(m.source, m.target) for m in moves], tensors))
    for bank, new, pairs, tensors in plans:
        if pairs:
            groups: dict[Any, list[DTensor]] = {}
            for tensor in tensors:
                key = tensor.device_mesh, sharding_of(tensor, 0)
                groups.setdefault(key, []).append(tensor)
            for members in groups.values():
                _move(bank, pairs, members)
        set_sharding(bank, replace(bank.sharding, placement=new))
        bank.dispatcher.set_placement(new)
    return sum(len(pairs) for _, _, pairs, _ in plans)


def _sharded(op: str, model: nn.Module) -> dict[str, Any]:
    banks = {name: bank for name, bank in banks_of(model) if bank.sharding is not None}
    if not banks:
        raise ValueError(
            f"{op}: model must hold experts of shard_experts, got {type(model).__name__} without."
        )
    return banks


def _check_placement(name: str, bank: Any, new: ExpertPlacement) -> None:
    old = bank.sharding.placement
    sizes = old.num_experts, old.num_ranks, old.num_physical
    if (new.num_experts, new.num_ranks, new.num_physical) != sizes or -1 in new.physical:
        raise ValueError(
            f"move_experts: placement of {name} must have {sizes[0]} experts on {sizes[1]} ranks "
            f"in {sizes[2]} places, none of them empty, got {new}."
        )
    if not hasattr(bank.dispatcher, "set_placement"):
        raise ValueError(
            f"move_experts: the dispatcher of {name} must have set_placement, got "
            f"{bank.dispatcher!r}."
        )


def _rows_of(name: str, bank: Bank, optimizer: Optimizer | None) -> list[DTensor]:
    """Returns all tensors with a row for each physical expert."""
    found: list[Any] = []
    for key, tensor in tensors_of(bank):
        assert isinstance(tensor, DTensor)
        found += [tensor.detach()] if tensor.grad is None else [tensor.detach(), tensor.grad]
        state = {} if optimizer is None else optimizer.state.get(tensor, {})
        for what, value in state.items():
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if (
                not isinstance(value, DTensor)
                or value.shape[:1] != tensor.shape[:1]
                or (value.device_mesh, value.placements) != (tensor.device_mesh, tensor.placements)
            ):
                raise ValueError(
                    f"move_experts: {what} that the optimizer keeps of {key} of {name} must be "
                    f"sharded like it, got {type(value).__name__} of shape {list(value.shape)}."
                )
            found.append(value)
    return found


# -------------------------------------------------------------------------------------- moving


def _move(bank: Any, pairs: Sequence[tuple[int, int]], tensors: list[DTensor]) -> None:
    """Copies rows between physical experts, for tensors with equal sharding.

    A row is sent to its target rank of expert parallelism, and from there, if FSDP2 also shards
    rows, to the rank that holds its part.
    """
    mesh, shard_dim = tensors[0].device_mesh, sharding_of(tensors[0], 0)
    here, ep_mesh = places_of(bank, tensors[0]), bank.sharding.ep_mesh
    per_rank, rank = bank.sharding.placement.per_rank, ep_mesh.get_local_rank()
    shards, part = 1, 0
    if shard_dim is not None:
        shards, part = mesh.size(shard_dim), mesh.get_local_rank(shard_dim)
    share = -(-per_rank // shards)

    def rank_of(place: int) -> int:
        return place // per_rank

    def part_of(place: int) -> int:
        return place % per_rank // share

    local = [tensor.to_local() for tensor in tensors]
    first = here.start
    held = [i for i, (source, _) in enumerate(pairs) if source in here]
    index = [pairs[i][0] - first for i in held]
    rows = torch.cat([_bytes(tensor[index]) for tensor in local], 1)
    arrive = [
        i
        for i, (source, target) in enumerate(pairs)
        if part_of(source) == part and rank_of(target) == rank
    ]
    by_rank = _Hop(lambda i: rank_of(pairs[i][1]), lambda i: rank_of(pairs[i][0]))
    rows, held = by_rank(rows, held, arrive, ep_mesh.get_group())
    if shard_dim is not None:
        arrive = [i for i, (_, target) in enumerate(pairs) if target in here]
        by_part = _Hop(lambda i: part_of(pairs[i][1]), lambda i: part_of(pairs[i][0]))
        rows, held = by_part(rows, held, arrive, mesh.get_group(shard_dim))
    index = [pairs[i][1] - first for i in held]
    sizes = [tensor.shape[1:].numel() * tensor.element_size() for tensor in local]
    for tensor, piece in zip(local, rows.split(sizes, 1), strict=True):
        tensor[index] = piece.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])


class _Hop(NamedTuple):
    """All-to-all of numbered rows.

    to: maps a row number to the target rank in the group.
    source: maps a row number to the source rank in the group.
    """

    to: Callable[[int], int]
    source: Callable[[int], int]

    def __call__(
        self, rows: Tensor, held: list[int], arriving: list[int], group: ProcessGroup
    ) -> tuple[Tensor, list[int]]:
        """Sends the held rows, in order of their numbers, and returns the received rows and their
        numbers."""
        n = group.size()
        order = sorted(range(len(held)), key=lambda k: (self.to(held[k]), held[k]))
        arriving = sorted(arriving, key=lambda i: (self.source(i), i))
        send, recv = [0] * n, [0] * n
        for i in held:
            send[self.to(i)] += 1
        for i in arriving:
            recv[self.source(i)] += 1
        return all_to_all_rows(rows[order], recv, send, group), arriving


def _bytes(rows: Tensor) -> Tensor:
    return rows.reshape(rows.shape[0], rows.shape[1:].numel()).contiguous().view(torch.uint8)

"""Placement of experts on processes.

Letters: E experts, P physical experts, n ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """Copy of the weights of `expert` from one physical expert to another.

    source, target: physical experts of the old and the new placement; rank r has those from r *
    per_rank on.
    """

    expert: int
    source: int
    target: int


@dataclass(frozen=True)
class ExpertPlacement:
    """E experts as P physical experts on n ranks, P / n per rank; physical expert p is on rank p //
    (P / n).

    An expert has at least one physical expert. If it has several (redundant experts), each rank
    sends its tokens to one of them: to its own if it has one, else ranks alternate.

    num_experts: E.
    num_ranks: n.
    physical: the expert of each of the P physical experts, or -1 for an empty one.

    Raises:
        ValueError: P is not a multiple of n, an expert is missing or twice on a rank, or a rank has
            no expert.
    """

    num_experts: int
    num_ranks: int
    physical: tuple[int, ...]

    def __post_init__(self) -> None:
        e, n, places = self.num_experts, self.num_ranks, len(self.physical)
        if e < 1 or n < 1:
            raise ValueError(
                f"ExpertPlacement: num_experts and num_ranks must be at least 1, got {e} and {n}."
            )
        if not places or places % n:
            raise ValueError(
                f"ExpertPlacement: physical must have a multiple of {n} places, got {places}."
            )
        if set(self.physical) - {-1} != set(range(e)):
            raise ValueError(
                f"ExpertPlacement: physical must hold all of 0 to {e - 1} and nothing else but -1, "
                f"got {self.physical}."
            )
        for rank in range(n):
            experts = self.local(rank)
            if not experts or len(set(experts)) < len(experts):
                raise ValueError(
                    f"ExpertPlacement: physical must give a rank one expert at least, and none "
                    f"twice, got {experts} on rank {rank}."
                )

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Returns the placement of ``Shard(0)`` of a DTensor: rank 0 has the first ceil(E / n)
        experts, rank 1 the next ones; the last rank may have fewer.

        Raises:
            ValueError: a rank would have none.
        """
        share = -(-num_experts // max(num_ranks, 1))
        if num_ranks < 1 or share * (num_ranks - 1) >= num_experts:
            raise ValueError(
                f"Placement.contiguous: num_ranks must leave each rank an expert of "
                f"{num_experts}, got {num_ranks} ranks with up to {share} each."
            )
        empty = share * num_ranks - num_experts
        return cls(num_experts, num_ranks, (*range(num_experts), *(-1,) * empty))

    @classmethod
    def balanced(
        cls,
        load: Sequence[float] | Tensor,
        num_ranks: int,
        num_physical: int | None = None,
        *,
        num_groups: int = 1,
        num_nodes: int = 1,
    ) -> ExpertPlacement:
        """Returns a placement that balances the loads of ranks.

        Each additional physical expert goes to the expert with the highest load per physical
        expert, at most one per rank. Then physical experts, those of experts with many of them and
        with high loads first, go to the ranks with the lowest loads that have room.

        Args:
            load: load of each of the E experts, at least 0: its number of tokens.
            num_ranks: n.
            num_physical: P, at least E and a multiple of n, at most E * n; None is the minimum.
            num_groups: groups of E / num_groups experts each, for routers that select groups first.
            num_nodes: machines of n / num_nodes ranks each. If it divides `num_groups`, groups are
                first distributed evenly to machines, and experts stay on the machine of their
                group, which then has P / num_nodes physical experts.

        Ties go to the lower expert and the lower rank: processes with equal loads compute equal
        placements.

        Raises:
            ValueError: a load is negative or not finite, groups or machines of different sizes, or
                no P fits.

        Source of the rule: DeepSeek-AI 2024, arXiv 2412.19437, section 3.4 (redundant experts).
        """
        loads = [float(value) for value in (load.tolist() if isinstance(load, Tensor) else load)]
        e = len(loads)
        if not all(math.isfinite(value) and value >= 0 for value in loads):
            raise ValueError(
                f"Placement.balanced: load must be finite and not negative, got {loads}."
            )
        for name, size, whole in (
            ("num_groups", num_groups, e),
            ("num_nodes", num_nodes, num_ranks),
        ):
            if size < 1 or whole % size:
                raise ValueError(f"Placement.balanced: {name} must divide {whole}, got {size}.")
        places = -(-e // max(num_ranks, 1)) * num_ranks if num_physical is None else num_physical
        by_machine = num_nodes > 1 and num_groups % num_nodes == 0
        most = e * max(num_ranks, 1) // (num_nodes if by_machine else 1)
        if not 1 <= num_ranks <= places or places % num_ranks or not e <= places <= most:
            raise ValueError(
                f"Placement.balanced: num_physical must be a multiple of {num_ranks} ranks between "
                f"{e} and {most}, got {places}."
            )
        if by_machine:
            machines = _machines(loads, num_groups, num_nodes)
            inside = (num_ranks // num_nodes, places // num_nodes)
            physical: list[int] = []
            for experts in machines:
                part = cls.balanced([loads[i] for i in experts], *inside)
                physical += [experts[i] if i >= 0 else -1 for i in part.physical]
            return cls(e, num_ranks, tuple(physical))
        copies = [1] * e
        for _ in range(places - e):
            free = (i for i in range(e) if copies[i] < num_ranks)
            copies[max(free, key=lambda i: (loads[i] / copies[i], -i))] += 1
        parts = [loads[i] / copies[i] for i in range(e)]
        # Experts on many ranks have the fewest alternatives.
        order = sorted(range(e), key=lambda i: (min(copies[i] - 1, 1) * -copies[i], -parts[i], i))
        ranks = _deal(order, copies, parts, num_ranks, places // num_ranks)
        return cls(e, num_ranks, tuple(expert for rank in ranks for expert in rank))

    @property
    def num_physical(self) -> int:
        """Returns P."""
        return len(self.physical)

    @property
    def per_rank(self) -> int:
        """Returns P / n, the physical experts per rank."""
        return len(self.physical) // self.num_ranks

    @property
    def is_contiguous(self) -> bool:
        """True if expert e is physical expert e."""
        return self.physical[: self.num_experts] == tuple(range(self.num_experts))

    @property
    def is_identity(self) -> bool:
        """True if expert e is physical expert e, and there are no others."""
        return self.is_contiguous and self.num_physical == self.num_experts

    @property
    def copies(self) -> tuple[int, ...]:
        """Returns the number of physical experts of each expert, [E]."""
        counts = Counter(self.physical)
        return tuple(counts[expert] for expert in range(self.num_experts))

    @property
    def has_replicas(self) -> bool:
        """True if an expert has more than one physical expert."""
        return len(self.physical) - self.physical.count(-1) > self.num_experts

    @property
    def first_places(self) -> tuple[int, ...]:
        """Returns the first physical expert of each expert, [E]."""
        return tuple(self.physical.index(expert) for expert in range(self.num_experts))

    def max_violation(self, load: Sequence[float] | Tensor) -> float:
        """Returns the load of the busiest rank over the mean, minus 1, if an expert's load is
        divided equally among its physical experts. load: [E]."""
        loads, copies = [float(value) for value in load], self.copies
        ranks = [
            sum(loads[e] / copies[e] for e in self.local(rank)) for rank in range(self.num_ranks)
        ]
        total = sum(ranks)
        return max(ranks) * self.num_ranks / total - 1 if total else 0.0

    def near(self, old: ExpertPlacement, num_nodes: int = 1) -> ExpertPlacement:
        """Returns a placement with these experts grouped as here, on the ranks of a machine and in
        the positions in which most of them are in the placement `old`, which needs fewer moves.

        Raises:
            ValueError: another number of physical experts or ranks, or machines of different sizes.
        """
        n = self.num_ranks
        if (old.num_physical, old.num_ranks) != (self.num_physical, n) or n % num_nodes:
            raise ValueError(
                f"Placement.near: old must have {self.num_physical} places on {n} ranks, and "
                f"num_nodes divide these, got {old.num_physical} on {old.num_ranks} and "
                f"{num_nodes}."
            )
        share = n // num_nodes
        same = {
            (a, b): len({*self.local(a)} & {*old.local(b)})
            for a in range(n)
            for b in range(a // share * share, a // share * share + share)
        }
        rank_of: dict[int, int] = {}
        for a, b in sorted(same, key=lambda pair: (-same[pair], pair)):
            if a not in rank_of.values() and b not in rank_of:
                rank_of[b] = a
        physical: list[int] = []
        for rank in range(n):
            before = old.physical[rank * self.per_rank : (rank + 1) * self.per_rank]
            mine = self.local(rank_of[rank])
            fresh = [e for e in mine if e not in before]
            for expert in before:
                physical.append(expert if expert in mine else (fresh.pop(0) if fresh else -1))
        return ExpertPlacement(self.num_experts, n, tuple(physical))

    def local(self, rank: int) -> tuple[int, ...]:
        """Returns the experts of a rank in order, without empty physical experts."""
        places = self.physical[rank * self.per_rank : (rank + 1) * self.per_rank]
        return tuple(expert for expert in places if expert >= 0)

    def table(self, rank: int) -> tuple[int, ...]:
        """Returns, for each of the E experts, the physical expert that tokens of `rank` go to."""
        return _table(self, rank)

    def to_physical(self, topk_ids: Tensor, rank: int, table: Tensor | None = None) -> Tensor:
        """Returns the physical experts that tokens of `rank` go to.

        Args:
            topk_ids: int32 or int64, ids of experts in [0, E); others are empty slots.
            table: `table(rank)` as an int32 tensor, if the caller keeps one on the device.

        Returns:
            int32 physical experts in [0, P), of the same shape; -1 for empty slots.
        """
        valid = (topk_ids >= 0) & (topk_ids < self.num_experts)
        if self.is_contiguous:
            return topk_ids.masked_fill(~valid, -1).int()
        if table is None:
            table = torch.tensor(self.table(rank), dtype=torch.int32, device=topk_ids.device)
        index = torch.where(valid, topk_ids, 0).long()
        return table[index].masked_fill(~valid, -1)

    def moves(self, new: ExpertPlacement) -> tuple[Move, ...]:
        """Returns the copies that change this placement to another one of the same experts, in the
        order of the new physical experts, without unchanged ones. A copy on the same rank is
        preferred, then the lowest source.

        Raises:
            ValueError: another number of experts or ranks.
        """
        if (new.num_experts, new.num_ranks) != (self.num_experts, self.num_ranks):
            raise ValueError(
                f"Placement.moves: new must have {self.num_experts} experts on {self.num_ranks} "
                f"ranks, got {new.num_experts} on {new.num_ranks}."
            )
        found = []
        for target, expert in enumerate(new.physical):
            if expert < 0:
                continue
            rank = target // new.per_rank
            sources = [p for p, other in enumerate(self.physical) if other == expert]
            source = min(sources, key=lambda p: (p // self.per_rank != rank, p))
            here = (rank, target % new.per_rank)
            if here != (source // self.per_rank, source % self.per_rank):
                found.append(Move(expert, source, target))
        return tuple(found)


def _machines(loads: list[float], num_groups: int, num_nodes: int) -> list[list[int]]:
    """Returns the experts of each machine, those of num_groups / num_nodes groups."""
    size = len(loads) // num_groups
    parts = [sum(loads[g * size : (g + 1) * size]) for g in range(num_groups)]
    order = sorted(range(num_groups), key=lambda g: (-parts[g], g))
    dealt = _deal(order, [1] * num_groups, parts, num_nodes, num_groups // num_nodes)
    return [[g * size + i for g in sorted(groups) for i in range(size)] for groups in dealt]


def _deal(
    order: list[int], copies: list[int], parts: list[float], num_ranks: int, share: int
) -> list[list[int]]:
    """Returns the experts of each rank: in the given order, each physical expert goes to the rank
    with the lowest load that has room. If that leaves too few ranks with room, it goes to the rank
    with the most room, which always works."""
    for by_load in (True, False):
        ranks: list[list[int]] = [[] for _ in range(num_ranks)]
        total = [0.0] * num_ranks
        for expert in order:
            fits = [r for r in range(num_ranks) if len(ranks[r]) < share]

            def key(r: int) -> tuple[float, ...]:
                size = len(ranks[r])  # noqa: B023
                return (total[r], size, r) if by_load else (size, total[r], r)  # noqa: B023

            fits.sort(key=key)
            if len(fits) < copies[expert]:
                break
            for rank in fits[: copies[expert]]:
                ranks[rank].append(expert)
                total[rank] += parts[expert]
        else:
            return ranks
    raise AssertionError("Places in the order of copies always fit.")


@lru_cache(maxsize=1024)
def _table(placement: ExpertPlacement, rank: int) -> tuple[int, ...]:
    places: list[list[int]] = [[] for _ in range(placement.num_experts)]
    for place, expert in enumerate(placement.physical):
        if expert >= 0:
            places[expert].append(place)
    own = range(rank * placement.per_rank, (rank + 1) * placement.per_rank)
    table = []
    for copies in places:
        here = [place for place in copies if place in own]
        table.append(here[0] if here else copies[rank % len(copies)])
    return tuple(table)

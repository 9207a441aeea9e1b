from __future__ import annotations

import itertools

import pytest
import torch

from moe_ops.parallel import ExpertPlacement, rebalance_experts
from moe_ops.parallel.placement import Move


def loads_of(placement: ExpertPlacement, load: list[float]) -> list[float]:
    copies = [placement.physical.count(e) for e in range(placement.num_experts)]
    return [
        sum(load[e] / copies[e] for e in placement.local(rank))
        for rank in range(placement.num_ranks)
    ]


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 4), (7, 4), (5, 2), (3, 3), (4, 1)])
def test_contiguous_is_how_dtensor_deals(num_experts, num_ranks):
    placement = ExpertPlacement.contiguous(num_experts, num_ranks)
    chunks = torch.arange(num_experts).chunk(num_ranks)
    assert [placement.local(r) for r in range(num_ranks)] == [tuple(c.tolist()) for c in chunks]
    assert placement.is_contiguous


def test_contiguous_leaves_no_rank_out(bad_input):
    with bad_input("Placement.contiguous", "num_ranks", "4 ranks", "up to 2"):
        ExpertPlacement.contiguous(6, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_to_physical(dtype):
    placement = ExpertPlacement(3, 2, (2, 0, 1, 2))
    ids = torch.tensor([[0, 1, 2], [-1, 3, 7]], dtype=dtype)
    for rank, wanted in enumerate([[1, 2, 0], [1, 2, 3]]):
        places = placement.to_physical(ids, rank)
        assert places.dtype == torch.int32
        assert places.tolist() == [wanted, [-1, -1, -1]]


def test_to_physical_of_contiguous_placements():
    ids = torch.tensor([[0, 6, 7, -3]])
    assert ExpertPlacement.contiguous(7, 4).to_physical(ids, 2).tolist() == [[0, 6, -1, -1]]


def test_ranks_without_a_replica_take_turns():
    placement = ExpertPlacement(4, 4, (0, 1, 0, 2, 3, 1, 3, 2))
    tables = [placement.to_physical(torch.arange(4)[None], r)[0].tolist() for r in range(4)]
    assert tables == [[0, 1, 3, 4], [2, 5, 3, 6], [0, 5, 3, 4], [2, 5, 7, 6]]


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("spare", [0, 1, 2, 5])
def test_balanced(num_ranks, spare):
    generator = torch.Generator().manual_seed(num_ranks + spare)
    for _ in range(20):
        load = torch.rand(16, generator=generator).pow(4)
        places = 16 + spare * num_ranks if num_ranks > 1 else 16
        placement = ExpertPlacement.balanced(load, num_ranks, places)
        assert placement.num_physical == places
        assert placement == ExpertPlacement.balanced(load.tolist(), num_ranks, places)
        even = float(load.sum()) / num_ranks
        worst = max(loads_of(placement, load.tolist()))
        # No rule can do better than the mean, nor split what has a single place.
        copies = [placement.physical.count(e) for e in range(16)]
        part = max(value / n for value, n in zip(load.tolist(), copies, strict=True))
        assert worst <= even + part


def test_balanced_beats_contiguous():
    load = [8.0, 8.0, 1.0, 1.0, 1.0, 1.0, 8.0, 8.0]
    assert max(loads_of(ExpertPlacement.contiguous(8, 4), load)) == 16
    assert max(loads_of(ExpertPlacement.balanced(load, 4), load)) == 9


def test_balanced_finds_room_for_every_set_of_copies():
    for e, n, spare in itertools.product((1, 2, 3, 5), (1, 2, 3, 4), (0, 1, 2, 3)):
        places = -(-e // n) * n + spare * n
        if places > e * n:
            continue
        for load in ([0.0] * e, [float(i == 0) for i in range(e)], [float(i) for i in range(e)]):
            assert ExpertPlacement.balanced(load, n, places).num_physical == places


def test_moves():
    old = ExpertPlacement.contiguous(4, 2)
    assert old.moves(old) == ()
    new = ExpertPlacement(4, 2, (0, 3, 2, 1))
    assert old.moves(new) == (Move(3, 3, 1), Move(1, 1, 3))
    more = ExpertPlacement(4, 2, (0, 1, 2, 2, 3, 1))
    assert old.moves(more) == (Move(2, 2, 2), Move(1, 1, 5))
    held = list(range(4))  # the weights, by place
    assert [held[m.source] for m in old.moves(more)] == [m.expert for m in old.moves(more)]


def test_bad_placements(bad_input):
    with bad_input("Placement", "physical", "3"):
        ExpertPlacement(3, 2, (0, 1, 2))
    with bad_input("Placement", "physical", "(0, 1, 1, 0)"):
        ExpertPlacement(3, 2, (0, 1, 1, 0))
    with bad_input("Placement", "physical", "(0, 0)"):
        ExpertPlacement(2, 2, (0, 0, 1, -1))
    with bad_input("Placement", "physical", "()"):
        ExpertPlacement(2, 2, (0, 1, -1, -1))
    with bad_input("Placement", "num_experts", "0 and 1"):
        ExpertPlacement(0, 1, (-1,))
    with bad_input("Placement.balanced", "load", "nan"):
        ExpertPlacement.balanced([1.0, float("nan")], 1)
    with bad_input("Placement.balanced", "num_physical", "5"):
        ExpertPlacement.balanced([1.0] * 4, 2, 5)
    with bad_input("Placement.moves", "new", "3 on 1"):
        ExpertPlacement.contiguous(4, 2).moves(ExpertPlacement.contiguous(3, 1))


# ---------------------------------------------------------------------- machines, moves, EPLB


def test_experts_stay_on_the_machine_of_their_group():
    load = torch.tensor([9.0, 1, 8, 1, 2, 2, 1, 3, 5, 1, 1, 1])
    placement = ExpertPlacement.balanced(load, 4, 16, num_groups=4, num_nodes=2)
    machines = [{*placement.local(r), *placement.local(r + 1)} for r in (0, 2)]
    for group in range(4):
        members = set(range(3 * group, 3 * group + 3))
        assert sum(members <= machine for machine in machines) == 1
    assert [len(machine) for machine in machines] == [6, 6]
    # The two busiest groups are apart, and each machine has two places more.
    assert placement.copies == (2, 1, 2, 1, 1, 1, 1, 2, 2, 1, 1, 1)
    # Machines that groups cannot be dealt to evenly count for nothing.
    free = ExpertPlacement.balanced(load, 4, 16)
    assert ExpertPlacement.balanced(load, 4, 16, num_groups=3, num_nodes=2) == free
    assert placement.max_violation(load) >= free.max_violation(load) >= 0


def test_groups_and_machines_of_different_sizes(bad_input):
    with bad_input("Placement.balanced", "num_groups", "3"):
        ExpertPlacement.balanced([1.0] * 8, 4, num_groups=3)
    with bad_input("Placement.balanced", "num_nodes", "3"):
        ExpertPlacement.balanced([1.0] * 8, 4, num_nodes=3)
    with bad_input("Placement.balanced", "num_physical", "12"):  # Two of an expert on one rank.
        ExpertPlacement.balanced([1.0] * 8, 4, 12, num_groups=4, num_nodes=4)


def test_max_violation():
    placement = ExpertPlacement(3, 2, (0, 1, 2, 0))
    assert placement.max_violation([4.0, 1, 1]) == 0
    assert placement.max_violation(torch.tensor([4, 3, 1])) == pytest.approx(5 / 4 - 1)
    assert placement.max_violation([0.0] * 3) == 0


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_near_moves_less_and_keeps_loads(num_nodes):
    generator = torch.Generator().manual_seed(num_nodes)
    for _ in range(10):
        load = torch.rand(16, generator=generator).pow(3)
        old = ExpertPlacement.balanced(load, 4, 20, num_groups=4, num_nodes=num_nodes)
        shift = load * (1 + 0.2 * torch.rand(16, generator=generator))
        new = ExpertPlacement.balanced(shift, 4, 20, num_groups=4, num_nodes=num_nodes)
        near = new.near(old, num_nodes)
        assert len(old.moves(near)) <= len(old.moves(new))
        assert sorted(loads_of(near, load.tolist())) == pytest.approx(
            sorted(loads_of(new, load.tolist()))
        )
        share = 4 // num_nodes
        for node in range(num_nodes):
            ranks = range(node * share, node * share + share)
            together, before = (
                sorted(sorted(placement.local(r)) for r in ranks) for placement in (near, new)
            )
            assert together == before
        assert old.near(old, num_nodes) == old


def test_near_of_other_sizes(bad_input):
    with bad_input("Placement.near", "old", "9 on 3"):
        ExpertPlacement.contiguous(8, 2).near(ExpertPlacement.contiguous(9, 3))


def test_rebalance_experts_answers_like_eplb():
    weight = torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4], [20, 107, 104, 64, 19, 197, 187, 1]])
    nothing = rebalance_experts(weight[:0], 12, 4, 2, 4)
    assert [t.shape for t in nothing] == [(0, 12), (0, 8, 1), (0, 8)]
    phy2log, log2phy, logcnt = rebalance_experts(weight, 12, 4, 2, 4)
    assert phy2log.shape == (2, 12) and log2phy.shape[:2] == (2, 8) and logcnt.shape == (2, 8)
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == torch.int64
    assert logcnt.sum(1).tolist() == [12, 12] and log2phy.shape[2] == logcnt.max()
    for layer, expert in itertools.product(range(2), range(8)):
        count = int(logcnt[layer, expert])
        places = log2phy[layer, expert, :count]
        assert (phy2log[layer, places] == expert).all()
        assert (log2phy[layer, expert, count:] == -1).all()
        placement = ExpertPlacement(8, 4, tuple(phy2log[layer].tolist()))
        assert placement.max_violation(weight[layer]) < 0.35

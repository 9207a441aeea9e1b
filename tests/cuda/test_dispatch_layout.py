from __future__ import annotations

import pytest
import torch
from tests.helpers.routing import Routing

import moe_ops
from moe_ops import reference
from moe_ops.testing import assert_identical

ROUTINGS = (
    Routing(300, 16, 8, "dropped"),  # one launch of the sort
    Routing(1500, 16, 3, "out_of_range", torch.int64),  # two launches of it
    Routing(40, 16, 33, "repeated"),
)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_schedules(simulator, routing):
    ids = routing.ids()
    simulator.check_schedules(lambda: moe_ops.dispatch_layout(ids, 4, 4))


def test_more_ranks_than_tables_fit_shared_memory():
    ids = torch.randint(-10, 20000, (50, 3))
    expected = reference.dispatch_layout(ids, 19000, 1)
    for a, b in zip(moe_ops.dispatch_layout(ids, 19000, 1), expected, strict=True):
        assert_identical(a, b)


def test_bytes(simulator):
    """csrc/cuda/NOTES.md has the formula: every token on two of four ranks, two slots on each."""
    t, k, n, i = 256, 4, 4, 8
    first = torch.randint(4, (t, 1))
    ids = 4 * torch.cat([first, first, (first + 1) % 4, (first + 1) % 4], 1) + torch.arange(4)
    counted = simulator.counted(lambda: moe_ops.dispatch_layout(ids, n, 4), "ld_bytes", "st_bytes")
    slots, rows, used = t * k, t * min(k, n), t * 2
    # Ids: of a slot and of those before it, up to the one that has its rank; again for each row.
    ranks_read = t * i * (1 + 2 + 3 + 4)
    sort_read = 2 * 4 * slots
    rows_read = 4 * slots + rows * k * 4 + used * k * (4 + 4 + i)
    assert counted["ld_bytes"] == ranks_read + sort_read + rows_read
    sort_written = 4 * 2 * slots + 4 * (n + 1)
    unused_slots = slots - used
    assert counted["st_bytes"] == 4 * slots + sort_written + 4 * unused_slots + 4 * rows * (k + 1)

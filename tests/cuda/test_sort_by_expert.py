from __future__ import annotations

import pytest
import torch
from tests.helpers.routing import Routing

import moe_ops
from moe_ops import reference
from moe_ops.testing import assert_identical, short

ROUTINGS = (
    Routing(300, 6, 8, "dropped"),  # one launch, slots in most warps
    Routing(1500, 7, 3, "out_of_range", torch.int64),  # two launches, two blocks
    Routing(700, 2000, 8, "skewed"),  # fewer warps: a table of all would not fit
    Routing(3, 300, 8, "dropped"),  # one part, warps that only look after buckets
    Routing(40, 60, 8, "skewed", torch.int64),  # three parts of four
)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_schedules(simulator, routing):
    ids = routing.ids()
    simulator.check_schedules(lambda: moe_ops.sort_by_expert(ids, routing.num_experts))


@pytest.mark.parametrize("num_tokens", [0, 3, 2100])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=short)
def test_tables_too_large_for_shared_memory(num_tokens, id_dtype):
    ids = torch.randint(-10, 20000, (num_tokens, 2), dtype=id_dtype)
    expected = reference.sort_by_expert(ids, 19000)
    for a, b in zip(moe_ops.sort_by_expert(ids, 19000), expected, strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(512, 1), (3000, 6)])
def test_bytes(simulator, num_tokens, blocks):
    """csrc/cuda/NOTES.md has the formula."""
    n, e, size = 8 * num_tokens, 60, 8
    ids = torch.randint(0, e, (num_tokens, 8))
    counted = simulator.counted(lambda: moe_ops.sort_by_expert(ids, e), "ld_bytes", "st_bytes")
    counts = 4 * blocks * (e + 1) if blocks > 1 else 0
    assert counted["ld_bytes"] == size * n * (3 if blocks > 1 else 2) + counts * blocks
    assert counted["st_bytes"] == 4 * 2 * n + 4 * (e + 1) + counts

"""More than 2^31 elements: an offset kept in 32 bits would point before the buffer."""

from __future__ import annotations

import gc
import os

import pytest
import torch

import moe_ops
from moe_ops.testing import assert_identical

GIB = 2**30


def available_bytes() -> int:
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def need(gib: float) -> None:
    if available_bytes() < gib * GIB:
        pytest.skip(
            f"needs {gib} GiB of free memory, this machine has {available_bytes() / GIB:.1f}"
        )


@pytest.mark.full
def test_permute_and_unpermute_beyond_2_to_31_elements():
    """x [T, H] is small; its rows [T*K, H] are 2.4e9 elements of bf16."""
    need(7)
    t, k, h = 1001, 1200, 2001
    assert t * k * h > 2**31
    x = torch.arange(t * h, dtype=torch.int32).remainder(251).sub(125).view(t, h).bfloat16()
    # Every slot to expert 0 but the last token's, which go last: row_to_slot is the identity, so
    # the rows past 2^31 elements are known in closed form.
    ids = torch.zeros(t, k, dtype=torch.int32)
    ids[-1] = 1
    expert_offsets, row_to_slot, slot_to_row = moe_ops.sort_by_expert(ids, 2)
    assert expert_offsets.tolist() == [0, (t - 1) * k, t * k]

    rows = moe_ops.permute(x, expert_offsets, row_to_slot)
    assert rows.numel() > 2**31
    for token in (0, 1, t // 2, 2**31 // (k * h) - 1, 2**31 // (k * h), t - 2, t - 1):
        own = rows[token * k : (token + 1) * k]
        assert bool((own == x[token]).all()), f"the rows of token {token}"

    y = moe_ops.unpermute(rows, expert_offsets, slot_to_row)
    del rows
    gc.collect()
    # k = 1200 copies of an integer of at most 7 bits: the fp32 sum is exact, and rounded once.
    assert_identical(y, (x.float() * k).bfloat16())


def test_grouped_gemm_beyond_2_to_31_elements():
    """The output [N, O] has 2.2e9 elements; only rows around 2^31 are computed again."""
    need(7)
    n, k, o = 1_100_000, 1, 1999
    assert n * o > 2**31
    a = torch.arange(n, dtype=torch.int32).remainder(127).view(n, k).bfloat16()
    b = torch.arange(3 * o, dtype=torch.int32).remainder(2).add(1).view(3, o, k).bfloat16()
    expert_offsets = torch.tensor([0, 400_000, 400_000, n - 5], dtype=torch.int32)
    out = moe_ops.grouped_gemm(a, b, expert_offsets)
    edge = 2**31 // o
    for begin in (0, 399_990, edge - 5, edge, n - 20):
        rows = torch.arange(begin, begin + 10)
        expert = torch.where(rows < 400_000, 0, 2)
        assert_identical(out[rows], (a[rows] * b[expert, :, 0]), f"rows from {begin}")
    assert bool((out[n - 5 :] == 0).all())

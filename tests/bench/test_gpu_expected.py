"""The arithmetic of `bench.gpu.expected`; what it says of the kernels is in their NOTES.md."""

from __future__ import annotations

import pytest
import torch
from bench.gpu import expected
from bench.gpu.cases import MODELS
from tests.helpers.dev import moe_ops_dev  # noqa: F401  # or skips


def test_tiles_of_ragged_rows():
    counts = torch.tensor([0, 1, 128, 129, 256, 300])
    pair = expected.Tile(128, 256, 2, False)
    # Pairs of 256 rows, three columns; an expert's last 128 rows take two columns at once.
    assert expected.row_tiles(counts, pair, 3, real_counts=False) == 3 * (1 + 1 + 1 + 1 + 2)
    assert expected.row_tiles(counts, pair, 3, real_counts=True) == 2 + 2 + 3 + 3 + (3 + 2)
    assert expected.row_tiles(counts, expected.Tile(128, 128), 3, real_counts=True) == 3 * 9


def test_the_last_block_ends_a_kernel():
    cycles = torch.tensor([5.0, 1.0, 1.0, 4.0, 3.0])
    assert expected._last_block(cycles, 2) == 9.0
    assert expected._last_block(cycles, 2, snake=True) == 12.0
    assert expected._last_block(cycles, 8) == 5.0


@pytest.mark.parametrize("name", expected.MODEL_NAMES)
@pytest.mark.parametrize("part", ["forward", "training"])
def test_no_share_above_the_floor_and_none_lost(name, part):
    shape, T = MODELS[name], 4096
    counts = expected.rows_of_experts(shape, T, "random")
    shares = [
        expected.expect(part, shape, T, "random", counts, kernels).share
        for kernels in (expected.BEFORE, expected.NOW)
    ]
    assert 0.3 < shares[0] <= shares[1] + 1e-9
    assert shares[1] <= 1


def test_tiles_are_read_as_the_library_writes_them():
    assert expected.parse_tile("128x256x64 cooperative cluster 2") == expected.Tile(
        128, 256, 2, False
    )

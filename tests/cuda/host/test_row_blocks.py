"""The grid of CUDA kernels on whole rows (csrc/cuda/row_blocks.h); asked without a card."""

from __future__ import annotations

import pytest
from tests.helpers.dev import moe_ops_dev

row_blocks = moe_ops_dev.row_blocks

MOST_YZ = 65535  # of any card
MOST_X = 2**31 - 1


@pytest.mark.parametrize("stretch", [64, 128])
@pytest.mark.parametrize(
    "accesses",
    [1, 63, 64, 65, 2**12 * 64, 2**12 * 64 + 1, 65535 * 64, 65536 * 64, 2**23 + 1, 2**31, 2**33],
)
@pytest.mark.parametrize("rows", [1, 8, 9, 2**20, 2**34 - 8])
def test_every_access_has_a_block(rows, accesses, stretch):
    x, y, z = row_blocks(rows, accesses, stretch)
    assert 1 <= x <= MOST_X and 1 <= y <= MOST_YZ and 1 <= z <= MOST_YZ
    assert 8 * (x - 1) < rows <= 8 * x
    stretches = -(-accesses // stretch)
    assert stretches <= y * z < stretches + z, "blocks that are missing, or many that are idle"


def test_usual_rows_need_no_third_dimension():
    """4096 stretches of 64 accesses are rows of 512 KiB at the least."""
    assert row_blocks(100, 4096 * 64, 64) == [13, 4096, 1]
    assert row_blocks(100, 4096 * 64 + 1, 64)[2] == 2

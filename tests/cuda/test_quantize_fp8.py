from __future__ import annotations

import pytest
import torch

import moe_ops
from moe_ops.testing import short

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)


@pytest.mark.parametrize("width", [640, 131])
@dtypes
def test_schedules(simulator, dtype, width):
    x = torch.randn(21, width).to(dtype)
    x[3, 5] = torch.nan
    simulator.check_schedules(lambda: moe_ops.quantize_fp8(x))


@pytest.mark.parametrize("width", [128, 640, 1028])
@dtypes
def test_bytes(simulator, dtype, width):
    """x once, codes and scales once."""
    x = torch.randn(21, width).to(dtype)
    counted = simulator.counted(lambda: moe_ops.quantize_fp8(x), "ld_bytes", "st_bytes")
    blocks = -(-width // 128)
    assert counted == {
        "ld_bytes": x.numel() * x.element_size(),
        "st_bytes": x.numel() + 21 * blocks * 4,
    }


OFFSETS = torch.tensor([0, 130, 130, 140, 300], dtype=torch.int32)


@pytest.mark.parametrize("width", [64, 131])
@dtypes
def test_schedules_of_columns(simulator, dtype, width):
    x = torch.randn(160, width).to(dtype)
    x[3, 5] = torch.nan
    slots = torch.randperm(320).int(), torch.rand(160, 2)
    simulator.check_schedules(lambda: moe_ops.quantize_fp8_columns(x, OFFSETS, *slots))


@pytest.mark.parametrize("width", [128, 258])
@dtypes
def test_bytes_of_columns(simulator, dtype, width):
    """Rows with an expert once, codes and scales of all groups once."""
    x = torch.randn(310, width).to(dtype)
    counted = simulator.counted(
        lambda: moe_ops.quantize_fp8_columns(x, OFFSETS), "ld_bytes", "st_bytes"
    )
    groups, tiles = 310 // 128 + 4, -(-width // 64)
    assert counted["st_bytes"] == groups * width * (128 + 4)
    # Every thread of a block finds its group in two looks at three offsets, and then at two.
    searches = groups * tiles * 256
    assert counted["ld_bytes"] - 300 * width * x.element_size() <= searches * 4 * 8


@pytest.mark.parametrize(
    "offsets", [[0, 4, 7, 13], [0, 8, 7, 12], [1, 4, 7, 12], [0, -4, 7, 12], [0, 4, 7, 2**31 - 1]]
)
def test_columns_of_wrong_indices_stay_inside(simulator, offsets):
    """A device cannot refuse what it reads; every access outside a tensor would be reported."""
    slots = torch.tensor([0, 5, -1, 13, 2**31 - 1, -(2**31), 3, 4, 0, 1, 2, 3]).int()
    x = torch.randn(6, 70)
    offsets = torch.tensor(offsets).int()
    moe_ops.quantize_fp8_columns(x, offsets, slots, torch.rand(6, 2))
    moe_ops.quantize_fp8_columns(torch.randn(12, 70), offsets)

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

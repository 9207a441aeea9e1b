"""SMs left to kernels of others (moe_ops.cuda.set_sm_margin)."""

from __future__ import annotations

import pytest
import torch

import moe_ops
from moe_ops import cuda


@pytest.fixture
def margin():
    before = cuda.sm_margin()
    yield cuda.set_sm_margin
    cuda.set_sm_margin(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fewer_blocks_and_the_same_bits(dtype, margin, simulator):
    a = torch.randn(600, 64).to(dtype)
    b = torch.randn(3, 256, 64).to(dtype)
    offsets = torch.tensor([0, 200, 450, 600], dtype=torch.int32)

    def instructions() -> int:
        return simulator.counted(lambda: results.append(call()), "insts")["insts"]

    def call() -> torch.Tensor:
        return moe_ops.grouped_gemm(a, b, offsets)

    results: list[torch.Tensor] = []
    margin(0)
    most = instructions()
    for sms in (9, 15, 1000):
        margin(sms)
        assert instructions() != most, sms  # blocks that set up and walk other lists
        assert torch.equal(results[-1], results[0])


@pytest.mark.parametrize("sms", [-1, 1.0, True, "8"])
def test_bad_margins(sms):
    with pytest.raises(ValueError, match="set_sm_margin: sms must be an int of at least 0, got"):
        cuda.set_sm_margin(sms)

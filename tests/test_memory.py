"""Large outputs keep their memory, and what is computed in it is right."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import moe_ops
from moe_ops import memory, reference
from moe_ops.testing import assert_close_by_norm

MIB = 2**20
CACHED = memory.cache_limit() > 64 * MIB and not torch.__version__.startswith("2.10.")
needs_cache = pytest.mark.skipif(
    not CACHED,
    reason="the buffer cache needs torch 2.11, Linux and a limit above 64 MiB",
)


def large_wgrad(rows: int = 5, out: int = 1536, dtype: torch.dtype = torch.float32):
    grad, a = torch.randn(rows, out, dtype=dtype), torch.randn(rows, 1536, dtype=dtype)
    return grad, a, torch.tensor([0, 2, rows])  # 18 MiB in fp32


@needs_cache
def test_the_next_output_takes_the_memory_of_the_last():
    memory.release_cached()
    arguments = large_wgrad()
    first = moe_ops.grouped_gemm_wgrad(*arguments)
    address = first.data_ptr()
    assert memory.cached_bytes() == 0
    del first
    assert memory.cached_bytes() >= 18 * MIB
    assert moe_ops.grouped_gemm_wgrad(*arguments).data_ptr() == address


@needs_cache
def test_live_outputs_never_share_memory():
    arguments = large_wgrad()
    outputs = [moe_ops.grouped_gemm_wgrad(*arguments) for _ in range(3)]
    assert len({t.data_ptr() for t in outputs}) == 3


@needs_cache
def test_release_returns_everything():
    moe_ops.grouped_gemm_wgrad(*large_wgrad())
    assert memory.cached_bytes() > 0
    memory.release_cached()
    assert memory.cached_bytes() == 0


@needs_cache
def test_a_gradient_is_taken_over_without_a_copy():
    memory.release_cached()
    grad, a, offsets = large_wgrad()
    b = torch.randn(2, 1536, 1536, requires_grad=True)
    moe_ops.grouped_gemm(a, b, offsets).backward(grad)
    assert memory.cached_bytes() == 0, "the gradient was copied and its memory given back"
    b.grad.mul_(2)
    assert torch.equal(b.grad, 2 * moe_ops.grouped_gemm_wgrad(grad, a, offsets))


@needs_cache
def test_tensors_may_be_freed_by_any_thread():
    memory.release_cached()
    outputs = [moe_ops.grouped_gemm_wgrad(*large_wgrad())]
    thread = threading.Thread(target=outputs.clear)
    thread.start()
    thread.join()
    assert memory.cached_bytes() >= 18 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out", [1536, 1540, 1531])
def test_values_in_used_memory(out: int, dtype: torch.dtype):
    grad, a, offsets = large_wgrad(out=out, dtype=dtype)
    moe_ops.grouped_gemm_wgrad(grad, a, offsets).fill_(float("nan"))
    actual = moe_ops.grouped_gemm_wgrad(grad, a, offsets)
    expected = reference.grouped_gemm_wgrad(grad.double(), a.double(), offsets)
    magnitude = reference.grouped_gemm_wgrad(grad.double().abs(), a.double().abs(), offsets)
    assert_close_by_norm(actual, expected, magnitude, sum_length=5)


@pytest.mark.parametrize(("setting", "kept"), [("0", False), ("64", True), ("nonsense", True)])
def test_limit_from_the_environment(setting: str, kept: bool):
    code = (
        "import torch, moe_ops; from moe_ops import memory;"
        "r = moe_ops.grouped_gemm_wgrad(torch.randn(3, 1536), torch.randn(3, 1536),"
        " torch.tensor([0, 3])); del r; print(memory.cached_bytes() > 0)"
    )
    environment = os.environ | {"MOE_OPS_CACHE_MB": setting}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(kept and CACHED)

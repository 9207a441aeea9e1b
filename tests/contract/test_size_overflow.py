"""Operands that take no memory ask for results that no memory holds: one sentence, no abort.

Expanded and empty operands make such calls cheap. The calls run in one process of their own, which
names each before it makes it, so that a crash names its case.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import moe_ops

pytestmark = pytest.mark.cpu_only

SLOTS = 2**31


def ones(*shape, dtype=torch.float32):
    return torch.ones((), dtype=dtype).expand(shape)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros((), dtype=dtype).expand(shape)


def map_of(*shape):
    return zeros(*shape, dtype=torch.int32)


def fp8(*shape):
    return torch.empty(*shape).to(torch.float8_e4m3fn)


def offsets(rows):
    return torch.tensor([0, rows])


# Op -> a call whose result takes 2^63 bytes or more.
TOO_MANY_BYTES = {
    # Bytes modulo 2^64 look like a size that the buffer cache serves.
    "grouped_gemm": lambda: moe_ops.grouped_gemm(
        torch.ones(2**20, 1), ones(1, 2**42 + 4, 1), offsets(2**20)
    ),
    "grouped_gemm_wgrad": lambda: moe_ops.grouped_gemm_wgrad(
        torch.empty(0, 2**31), torch.empty(0, 2**32), offsets(0)
    ),
    "grouped_sum": lambda: moe_ops.grouped_sum(torch.empty(0, 2**62), offsets(0)),
    "grouped_gemm_fp8": lambda: moe_ops.grouped_gemm_fp8(
        fp8(2**31, 0), torch.ones(2**31, 0), fp8(1, 2**32, 0), torch.ones(1, 2**25, 0), offsets(0)
    ),
    "moe_ffn": lambda: moe_ops.moe_ffn(
        torch.empty(2**20, 0, requires_grad=True),
        torch.empty(1, 2**43, 0),
        torch.empty(1, 0, 2**42),
        ones(2**20, 1),
        map_of(2**20, 1),
    ),
    "moe_linear_map": lambda: moe_ops.moe_linear_map(
        torch.empty(2**20, 0), torch.empty(1, 2**42, 0), map_of(2**20, 1)
    ),
    "moe_linear_reduce": lambda: moe_ops.moe_linear_reduce(
        torch.empty(2**20, 1, 0), torch.empty(1, 2**42, 0), ones(2**20, 1), map_of(2**20, 1)
    ),
    "dense_ffn": lambda: moe_ops.dense_ffn(
        torch.empty(2**20, 1, 0), torch.empty(1, 0, 0), torch.empty(1, 2**42, 0), map_of(1)
    ),
    "topk_router": lambda: moe_ops.topk_router(torch.ones(4).expand(2**60, 4), 4),
    "topp_router": lambda: moe_ops.topp_router(torch.ones(4).expand(2**60, 4), 0.5, 4),
    "expert_choice_router": lambda: moe_ops.expert_choice_router(torch.ones(4).expand(2**60, 4), 4),
    "router_linear": lambda: moe_ops.router_linear(torch.empty(2**40, 0), torch.empty(2**22, 0)),
    "rotary": lambda: moe_ops.rotary(
        torch.ones(2, dtype=torch.float64).expand(2**60, 1, 2),
        ones(1, 1, dtype=torch.float64),
        ones(1, 1, dtype=torch.float64),
    ),
    "moa_attention": lambda: moe_ops.moa_attention(
        ones(2**20, 2**20, 1, 2**20, 1, dtype=torch.float64),
        *[ones(2**20, 2**20, 2**20, 1, dtype=torch.float64)] * 2,
        kind="softmax",
    ),
    "pack_experts": lambda: moe_ops.pack_experts(ones(1, 2**61, 1)),
}
TOO_MANY_SLOTS = {
    "sort_slots": lambda: moe_ops.sort_slots(map_of(SLOTS, 1), 4),
    "permute": lambda: moe_ops.permute(ones(SLOTS, 1), offsets(SLOTS), map_of(SLOTS)),
    "permute_bwd": lambda: torch.ops.moe_ops.permute_bwd(
        ones(SLOTS, 1), offsets(SLOTS), map_of(SLOTS), 1
    ),
    "unpermute": lambda: moe_ops.unpermute(ones(SLOTS, 1), offsets(SLOTS), map_of(1, SLOTS)),
    "unpermute_bwd": lambda: torch.ops.moe_ops.unpermute_bwd(
        ones(1, 1), ones(SLOTS, 1), offsets(SLOTS), map_of(1, SLOTS), None
    ),
    "moe_ffn_bwd": lambda: torch.ops.moe_ops.moe_ffn_bwd(
        ones(1, 1),
        ones(1, 1),
        ones(1, 2, 1),
        ones(1, 1, 1),
        ones(1, SLOTS),
        ones(SLOTS, 2),
        offsets(SLOTS),
        map_of(SLOTS),
        map_of(1, SLOTS),
        None,
        *("swiglu", False, False, 1.702, 7.0),
        *[True] * 6,
    ),
}


def report():
    for kind, calls in (("bytes", TOO_MANY_BYTES), ("slots", TOO_MANY_SLOTS)):
        for op, call in calls.items():
            print(json.dumps([kind, op, "the process ended here"]), flush=True)
            try:
                call()
                said = "returned"
            except Exception as error:
                said = f"{type(error).__name__} {error}"
            print(json.dumps([kind, op, said]), flush=True)


@pytest.fixture(scope="module")
def said():
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {(kind, op): what for kind, op, what in lines}


@pytest.mark.parametrize("op", TOO_MANY_BYTES)
def test_too_many_bytes(op, said):
    what = said.get(("bytes", op))
    assert what is not None, "the process ended before"
    assert what.startswith(f"ValueError {op}: "), what
    assert "must take fewer than 2^63 bytes" in what and ", got shape [" in what, what
    assert what.count("\n") == 0 and what.endswith("."), what


@pytest.mark.parametrize("op", TOO_MANY_SLOTS)
def test_too_many_slots(op, said):
    what = said.get(("slots", op))
    assert what is not None, "the process ended before"
    assert what.startswith(f"ValueError {op}: "), what
    assert f"must hold fewer than 2^31 slots, got {SLOTS}." in what, what


if __name__ == "__main__":
    report()

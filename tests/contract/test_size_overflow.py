"""Operands that take no memory ask for results that no memory holds: one sentence, no abort.

Expanded and empty operands make such calls cheap. The calls run in one process of their own, which
names each before it makes it, so that a crash names its case.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers.op_case import BARE_OP_ERROR, map_of, ones

import moe_ops

from .every_op import CASES

pytestmark = pytest.mark.cpu_only

SLOTS = 2**31


def offsets(rows):
    return torch.tensor([0, rows])


TOO_MANY_BYTES = {op: case.too_many_bytes for op, case in CASES.items() if case.too_many_bytes}
TOO_MANY_SLOTS = {
    "sort_by_expert": lambda: moe_ops.sort_by_expert(map_of(SLOTS, 1), 4),
    "dispatch_layout": lambda: moe_ops.dispatch_layout(map_of(SLOTS, 1), 2, 2),
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
    run = subprocess.run(
        [sys.executable, "-m", "tests.contract.test_size_overflow"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
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
    kind = BARE_OP_ERROR if op.endswith("_bwd") else ValueError  # No function of moe_ops is a _bwd.
    assert what.startswith(f"{kind.__name__} {op}: "), what
    assert f"must hold fewer than 2^31 slots, got {SLOTS}." in what, what


if __name__ == "__main__":
    report()

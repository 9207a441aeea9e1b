from __future__ import annotations

import pytest
import torch

import moe_ops
from moe_ops import reference
from moe_ops.testing import assert_identical, short


@pytest.mark.parametrize(
    ("t", "e", "capacity", "dtype"),
    [
        (700, 5, 90, torch.bfloat16),
        (40, 60, 3, torch.float32),
        (40, 260, 2, torch.float64),  # more experts than registers hold in fp64
    ],
    ids=lambda v: short(v) if isinstance(v, torch.dtype) else str(v),
)
def test_schedules(simulator, t, e, capacity, dtype):
    logits = torch.randn(t, e).to(dtype).requires_grad_()
    grad = torch.randn(t, e, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def call():
        weights, ids = moe_ops.expert_choice_router(logits, capacity)
        return weights, ids, *torch.autograd.grad(weights, logits, grad)

    simulator.check_schedules(call)


@pytest.mark.parametrize("capacity", [1, 600, 29999])
def test_column_too_long_for_shared_memory(simulator, capacity):
    logits = torch.randn(30000, 1, dtype=torch.float64).mul(4).round().div(4)
    _, ids = moe_ops.expert_choice_router(logits, capacity, score_func="sigmoid")
    _, expected = reference.expert_choice_router(logits, capacity, score_func="sigmoid")
    assert_identical(ids, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
@pytest.mark.parametrize("capacity", [1, 511, 512, 513, 1000, 1099])
def test_ties_across_the_block(capacity, dtype):
    """Few different scores: the last token to win a tie lies in any warp of any round."""
    logits = torch.randint(-1, 2, (1100, 3)).to(dtype)
    _, ids = moe_ops.expert_choice_router(logits, capacity, score_func="sigmoid")
    _, expected = reference.expert_choice_router(logits, capacity, score_func="sigmoid")
    assert_identical(ids, expected)


def test_bytes(simulator):
    """csrc/cuda/NOTES.md has the formula."""
    t, e = 300, 64
    logits = torch.randn(t, e).bfloat16()
    counted = simulator.counted(
        lambda: moe_ops.expert_choice_router(logits, 20), "ld_bytes", "st_bytes"
    )
    scores, thresholds = 4 * t * e, 16 * e
    assert counted["ld_bytes"] == 2 * t * e + 2 * scores + t * thresholds
    assert counted["st_bytes"] == scores + thresholds + 2 * scores
    everyone = simulator.counted(
        lambda: moe_ops.expert_choice_router(logits, t), "ld_bytes", "st_bytes"
    )
    assert everyone == {"ld_bytes": 2 * t * e + scores, "st_bytes": 3 * scores}

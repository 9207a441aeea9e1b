from __future__ import annotations

import pytest
import torch

import moe_ops
from moe_ops import reference
from moe_ops.testing import assert_identical


@pytest.mark.parametrize("e", [60, 1100])
def test_schedules(simulator, e):
    logits = torch.randn(9, e).bfloat16().requires_grad_()
    grad = torch.randn(9, 50)

    def call():
        weights, ids = moe_ops.topp_router(logits, 0.9, 50, renormalize=True)
        return weights, ids, *torch.autograd.grad(weights, logits, grad)

    simulator.check_schedules(call)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("e", "max_k"), [(300, 70), (1100, 40), (1100, 300), (96, 96)])
def test_many_slots_and_experts(e, max_k, renormalize):
    """More than a batch of 32 slots, more experts than registers hold."""
    logits = torch.randn(5, e, dtype=torch.float64)
    logits[0] *= 20  # one slot
    options = {"min_k": 1, "renormalize": renormalize, "routed_scaling_factor": 1.5}
    expected, expected_ids = reference.topp_router(logits, 0.7, max_k, **options)
    weights, ids = moe_ops.topp_router(logits, 0.7, max_k, **options)
    assert_identical(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(("e", "max_k"), [(64, 20), (64, 64)])
def test_bytes(simulator, e, max_k):
    logits = torch.randn(13, e).bfloat16()
    counted = simulator.counted(
        lambda: moe_ops.topp_router(logits, 0.3, max_k), "ld_bytes", "st_bytes"
    )
    assert counted == {"ld_bytes": 13 * 2 * e, "st_bytes": 13 * 8 * max_k}

from __future__ import annotations

import pytest
import torch
from tests.helpers.routing import Routing

import moe_ops

ROUTING = Routing(23, 5, 3, "out_of_range")


def operands(hidden_size, dtype, routing=ROUTING):
    expert_offsets, _, slot_to_row = routing.sorted()
    rows = torch.randn(routing.num_slots, hidden_size).to(dtype).requires_grad_()
    weights = torch.rand(routing.num_tokens, routing.top_k).requires_grad_()
    return rows, expert_offsets, slot_to_row, weights


@pytest.mark.parametrize("routing", [ROUTING, Routing(3, 50, 37)], ids=str)
@pytest.mark.parametrize("hidden_size", [33, 1032])
def test_schedules(simulator, hidden_size, routing):
    rows, expert_offsets, slot_to_row, weights = operands(hidden_size, torch.bfloat16, routing)
    grad = torch.randn(routing.num_tokens, hidden_size).bfloat16()

    def call():
        y = moe_ops.unpermute(rows, expert_offsets, slot_to_row, weights)
        return y, *torch.autograd.grad(y, (rows, weights), grad)

    simulator.check_schedules(call)


def test_schedules_of_a_map_with_repeats(simulator):
    """Rows that several slots name, and none: which warp writes them depends on no order."""
    rows, expert_offsets, slot_to_row, weights = operands(1032, torch.bfloat16)
    slot_to_row = torch.randint(69, slot_to_row.shape, dtype=torch.int32)
    grad = torch.randn(ROUTING.num_tokens, 1032).bfloat16()

    def call():
        y = moe_ops.unpermute(rows, expert_offsets, slot_to_row, weights)
        return torch.autograd.grad(y, (rows, weights), grad)

    simulator.check_schedules(call)


def test_bad_values_lead_nowhere():
    """A device op cannot raise for them: their slots add nothing, and nothing outside is read."""
    rows, expert_offsets, slot_to_row, weights = operands(8, torch.float32)
    for bad in (-1, ROUTING.num_slots, 2**31 - 1, -(2**31)):
        changed = slot_to_row.clone()
        changed[4, 1] = bad
        y = moe_ops.unpermute(rows, expert_offsets, changed, weights)
        without = weights.detach().clone()
        without[4, 1] = 0
        torch.testing.assert_close(y, moe_ops.unpermute(rows, expert_offsets, slot_to_row, without))
        grad_rows, grad = torch.autograd.grad(y, (rows, weights), torch.ones_like(y))
        assert bool(grad.isfinite().all())
        assert grad[4, 1] == 0
        left = int(slot_to_row[4, 1])
        assert bool((grad_rows[left] == 0).all())
        assert bool((grad_rows[: expert_offsets[-1]] != 0).any(1).sum() >= expert_offsets[-1] - 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hidden_size", [512, 1024, 1032])
def test_bytes(simulator, hidden_size, weighted):
    """csrc/cuda/NOTES.md has the formula."""
    routing = Routing(40, 6, 3)
    rows, expert_offsets, slot_to_row, weights = operands(hidden_size, torch.bfloat16, routing)
    t, n, h, w = routing.num_tokens, routing.num_slots, 2 * hidden_size, 4 * weighted
    weights = weights if weighted else None
    call = rows, expert_offsets, slot_to_row, weights
    counted = simulator.counted(lambda: moe_ops.unpermute(*call), "ld_bytes", "st_bytes")
    stretches = -(-h // 1024)
    assert counted == {
        "ld_bytes": n * h + stretches * ((4 + w) * n + 4 * t),
        "st_bytes": t * h,
    }

    y = moe_ops.unpermute(*call)
    leaves = (rows, weights) if weighted else (rows,)
    grad = torch.randn_like(y)
    counted = simulator.counted(
        lambda: torch.autograd.grad(y, leaves, grad), "ld_bytes", "st_bytes"
    )
    assert counted == {
        "ld_bytes": n * (h * (2 if weighted else 1) + 24 + w),
        "st_bytes": n * (h + w + 8),
    }

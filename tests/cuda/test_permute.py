from __future__ import annotations

import pytest
import torch
from tests.helpers.routing import Routing

import moe_ops
from moe_ops.testing import DTYPES, assert_identical, short

ROUTING = Routing(29, 5, 3, "out_of_range")


def operands(hidden_size, dtype, routing=ROUTING):
    expert_offsets, row_to_slot, _ = routing.sorted()
    x = torch.randn(routing.num_tokens, hidden_size).to(dtype).requires_grad_()
    return x, expert_offsets, row_to_slot


@pytest.mark.parametrize("hidden_size", [33, 2176])
def test_schedules(simulator, hidden_size):
    x, *maps = operands(hidden_size, torch.bfloat16)
    grad = torch.randn(ROUTING.num_slots, hidden_size).bfloat16()

    def call():
        rows = moe_ops.permute(x, *maps)
        return rows, *torch.autograd.grad(rows, x, grad)

    simulator.check_schedules(call)


def test_schedules_of_a_map_with_repeats(simulator):
    """Slots that several rows name, and none: the order of the sum depends on no schedule."""
    x, expert_offsets, row_to_slot = operands(1032, torch.bfloat16)
    row_to_slot = torch.randint(87, row_to_slot.shape, dtype=torch.int32)
    rows = moe_ops.permute(x, expert_offsets, row_to_slot)
    grad = torch.randn(87, 1032).bfloat16()
    simulator.check_schedules(
        lambda: torch.autograd.grad(rows, x, grad, retain_graph=True),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_bad_values_lead_nowhere(dtype):
    """A device op cannot raise for them: their rows come out zero, and nothing outside is read."""
    x, expert_offsets, row_to_slot = operands(8, dtype)
    want = moe_ops.permute(x, expert_offsets, row_to_slot)
    for bad in (-1, ROUTING.num_slots, 2**31 - 1, -(2**31)):
        changed = row_to_slot.clone()
        changed[3] = bad
        rows = moe_ops.permute(x, expert_offsets, changed)
        expected = want.clone()
        expected[3] = 0
        assert_identical(rows, expected)
        (grad,) = torch.autograd.grad(rows, x, torch.ones_like(rows))
        assert bool(grad.isfinite().all())
        assert float(grad[:, 0].sum()) == int(expert_offsets[-1]) - 1
    beyond = expert_offsets.clone()
    beyond[-1] = 2**30
    assert_identical(moe_ops.permute(x, beyond, row_to_slot)[-1], x[row_to_slot[-1] // 3])
    beyond[-1] = -1
    assert bool((moe_ops.permute(x, beyond, row_to_slot) == 0).all())


@pytest.mark.parametrize(("hidden_size", "stretches"), [(512, 1), (2048, 4), (1032, 3)])
def test_bytes(simulator, hidden_size, stretches):
    """csrc/cuda/NOTES.md has the formula."""
    routing = Routing(40, 6, 3)
    x, *maps = operands(hidden_size, torch.bfloat16, routing)
    n, h = routing.num_slots, 2 * hidden_size
    counted = simulator.counted(lambda: moe_ops.permute(x, *maps), "ld_bytes", "st_bytes")
    stretches = -(-h // 2048)
    assert counted == {"ld_bytes": n * (h + 8 * stretches), "st_bytes": n * h}

    grad = torch.randn(n, hidden_size).bfloat16()
    rows = moe_ops.permute(x, *maps)
    counted = simulator.counted(lambda: torch.autograd.grad(rows, x, grad), "ld_bytes", "st_bytes")
    stretches = -(-h // 1024)
    maps_read = 4 * n + stretches * (8 * n + 4 * routing.num_tokens)
    assert counted == {
        "ld_bytes": n * h + maps_read,
        "st_bytes": routing.num_tokens * h + 8 * n,
    }


def test_rows_longer_than_a_grid_is_high(simulator):
    """More than 4096 stretches: blocks in z. Rows of odd bytes, read two bytes at a time."""
    h = 4096 * 128 + 1
    x = torch.arange(2 * h, dtype=torch.int32).remainder(251).view(2, h).bfloat16()
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    row_to_slot = torch.tensor([1, 0], dtype=torch.int32)
    assert_identical(moe_ops.permute(x, offsets, row_to_slot), x.flip(0))

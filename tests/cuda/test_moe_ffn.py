"""moe_ffn, moe_linear_map and moe_linear_reduce on CUDA: schedules, and what moves."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import ffn_operands
from tests.helpers.routing import Routing

import moe_ops
from moe_ops.testing import short

ROUTING = Routing(21, 5, 2, "dropped")


def forward_and_backward(op, call, names):
    """A function of nothing that gives the output and every gradient."""
    leaves = {name: call[name].clone().requires_grad_() for name in names}
    y = op(**{**call, **leaves})
    grad = torch.randn_like(y)

    def run():
        y = op(**{**call, **leaves})
        return (y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad))

    return run


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(
    ("activation", "interleaved", "sizes"),
    [("swiglu", False, (24, 40)), ("swiglu_oai", True, (23, 17)), ("relu2", False, (9, 16))],
    ids=["swiglu", "oai-interleaved", "relu2"],
)
def test_ffn_schedules(simulator, activation, interleaved, sizes, dtype, on_input):
    call = ffn_operands(ROUTING, *sizes, dtype, activation=activation, bias=True)
    call |= {"interleaved": interleaved, "apply_router_weight_on_input": on_input}
    names = ("x", "w_gate_up", "w_down", "topk_weights", "b_gate_up", "b_down")
    simulator.check_schedules(forward_and_backward(moe_ops.moe_ffn, call, names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_linear_map_schedules(simulator, dtype):
    call = {
        "x": torch.randn(21, 24).to(dtype),
        "w": torch.randn(5, 17, 24).to(dtype),
        "topk_ids": ROUTING.ids(),
        "bias": torch.randn(5, 17).to(dtype),
    }
    run = forward_and_backward(moe_ops.moe_linear_map, call, ("x", "w", "bias"))
    simulator.check_schedules(run)


@pytest.mark.parametrize("names", [("h", "w", "topk_weights", "bias"), ("h",)], ids=["all", "h"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_linear_reduce_schedules(simulator, dtype, names):
    call = {
        "h": torch.randn(21, 2, 17).to(dtype),
        "w": torch.randn(5, 24, 17).to(dtype),
        "topk_weights": torch.rand(21, 2),
        "topk_ids": ROUTING.ids(),
        "bias": torch.randn(5, 24).to(dtype),
    }
    simulator.check_schedules(forward_and_backward(moe_ops.moe_linear_reduce, call, names))


@pytest.mark.parametrize("offsets", [[0, 50, 7, 42, 43], [-1, 3, 9, 2**30, 42]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_maps_that_lead_nowhere_stay_inside(dtype, offsets):
    """Backward takes maps as they come; every access outside a tensor would be reported."""
    call = ffn_operands(Routing(21, 4, 2), 16, 8, dtype, bias=True)
    y, preact, _, row_to_slot, slot_to_row = torch.ops.moe_ops.moe_ffn_fwd(
        *(call[k] for k in ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids"))
    )
    row_to_slot[::3] = 2**31 - 1
    row_to_slot[1::3] = -5
    slot_to_row[::2] = 42
    slot_to_row[1::4] = -(2**31)
    for on_input in (False, True):
        torch.ops.moe_ops.moe_ffn_bwd(
            y,
            call["x"],
            call["w_gate_up"],
            call["w_down"],
            call["topk_weights"],
            preact,
            torch.tensor(offsets, dtype=torch.int32),
            row_to_slot,
            slot_to_row,
            call["b_down"],
            *("swiglu", False, on_input, 1.702, 7.0),
            *[True] * 6,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_forward_stores_no_copy_of_x(simulator, dtype):
    """The forward stores the routing, activation, one output a row, y; the pre-activation too where
    the activation is a kernel of its own (the fused ones keep it for a backward alone), and the
    slots of rows where the slots are sorted by a kernel of its own."""
    t, e, k, hidden, inner = 40, 4, 2, 96, 48
    call = ffn_operands(Routing(t, e, k), hidden, inner, dtype)
    counted = simulator.counted(lambda: moe_ops.moe_ffn(**call), "st_bytes")
    n, size = t * k, dtype.itemsize
    fused = dtype != torch.float32
    rows = n * (inner + hidden + (0 if fused else 2 * inner)) * size
    maps = n if fused else 2 * n
    assert counted["st_bytes"] == 4 * (maps + e + 1) + rows + t * hidden * size

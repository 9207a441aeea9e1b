from __future__ import annotations

import pytest
import torch
from tests.helpers.routing import Routing

import moe_ops

FLOATS = ("x", "w_gate_up", "w_down", "topk_weights")


def operands(hidden_size, dtype, routing):
    t, k, e = routing.num_tokens, routing.top_k, routing.num_experts
    call = {
        "x": torch.randn(t, hidden_size).to(dtype),
        "w_gate_up": torch.randn(e, 2, hidden_size).to(dtype),
        "w_down": torch.randn(e, hidden_size, 1).to(dtype),
        "topk_weights": torch.rand(t, k),
    }
    call = {name: value.requires_grad_() for name, value in call.items()}
    return {**call, "topk_ids": routing.ids(), "activation": "swiglu"}


@pytest.mark.parametrize("hidden_size", [33, 1032])
def test_schedules(simulator, hidden_size):
    """More slots of a token, and of an expert, than a warp has lanes."""
    call = operands(hidden_size, torch.bfloat16, Routing(3, 2, 37, "repeated"))
    grad = torch.randn(3, hidden_size).bfloat16()

    def run():
        y = moe_ops.peer_ffn(**call)
        return y, *torch.autograd.grad(y, [call[name] for name in FLOATS], grad)

    simulator.check_schedules(run)


def test_bad_rows_of_gradients_lead_nowhere():
    """Places outside the rows that are asked for add to none of them."""
    call = operands(8, torch.float32, Routing(5, 4, 3))
    tensors = [call[name].detach() for name in FLOATS]
    y, preact = torch.ops.moe_ops.peer_ffn_fwd(*tensors, call["topk_ids"], "swiglu")
    places = torch.tensor([[-1, 2, 2**31 - 1], *[[-(2**31), -1, 5]] * 4], dtype=torch.int32)
    grads = torch.ops.moe_ops.peer_ffn_bwd(
        torch.ones_like(y), *tensors, call["topk_ids"], preact, places, "swiglu", 2,
        True, True, True, True,
    )  # fmt: skip
    assert grads[1].shape == (2, 2, 8) and not grads[1].any() and not grads[2].any()
    assert all(bool(g.isfinite().all()) for g in grads)

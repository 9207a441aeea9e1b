from __future__ import annotations

import pytest
import torch

import moe_ops


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("size", [37, 1032])
def test_schedules(simulator, size, interleaved):
    gate_up = torch.randn(11, 2 * size).bfloat16().requires_grad_()
    grad = torch.randn(11, size).bfloat16()

    def call():
        h = moe_ops.gated_act(gate_up, interleaved=interleaved)
        return h, *torch.autograd.grad(h, gate_up, grad)

    simulator.check_schedules(call)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("size", [37, 512, 1032])
def test_bytes(simulator, size, interleaved):
    """Every operand once."""
    gate_up = torch.randn(11, 2 * size).bfloat16().requires_grad_()
    grad = torch.randn(11, size).bfloat16()
    h = moe_ops.gated_act(gate_up, interleaved=interleaved)
    part = 2 * h.numel()
    assert simulator.counted(
        lambda: moe_ops.gated_act(gate_up, interleaved=interleaved), "ld_bytes", "st_bytes"
    ) == {"ld_bytes": 2 * part, "st_bytes": part}
    assert simulator.counted(
        lambda: torch.autograd.grad(h, gate_up, grad), "ld_bytes", "st_bytes"
    ) == {"ld_bytes": 3 * part, "st_bytes": 2 * part}

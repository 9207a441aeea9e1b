"""The weight gradient of moe_linear_reduce on its own sm_90a kernel, whose rows have factors."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.routing import Routing
from tests.helpers.simulator import noticed_mutants

import moe_ops
from moe_ops import reference
from moe_ops.testing import assert_identical, check_against_reference, short

HALF = (torch.bfloat16, torch.float16)


def operands(routing, dtype, head_size=136, hidden_size=264):
    t, k, e = routing.num_tokens, routing.top_k, routing.num_experts
    return {
        "h": torch.randn(t, k, head_size).to(dtype),
        "w": torch.randn(e, hidden_size, head_size).to(dtype),
        "topk_weights": torch.rand(t, k) + 0.1,
        "topk_ids": routing.ids(),
    }


def grad_w(call, grad):
    """A function of nothing that gives the gradient of w; the forward pass has been run."""
    w = call["w"].detach().requires_grad_()
    y = moe_ops.moe_linear_reduce(**{**call, "w": w})
    return lambda: torch.autograd.grad(y, w, grad, retain_graph=True)[0]


@pytest.mark.parametrize(
    "kind", ["uniform", "skewed", "dropped", "out_of_range", "one_expert", "few"]
)
@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_values(simulator, monkeypatch, dtype, kind):
    routing = Routing(3, 5, 2) if kind == "few" else Routing(150, 3, 2, kind)
    call = operands(routing, dtype)
    monkeypatch.delenv("MOE_OPS_GEMM_TILE", raising=False)
    check_against_reference(
        moe_ops.moe_linear_reduce,
        reference.moe_linear_reduce,
        call,
        ["w", "topk_weights"],
        sum_length=300,
        steps=1,
        grad_steps=2,
    )
    run = grad_w(call, torch.randn(routing.num_tokens, 264).to(dtype))
    got = []
    assert simulator.counted(lambda: got.append(run()), "wgmma")["wgmma"] > 0
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", "generic")
    assert simulator.counted(lambda: got.append(run()), "wgmma")["wgmma"] == 0
    # Both kernels round factor * h, which is most of the error: what is left are sums in another
    # order, and here and there a rounding that falls to the other side.
    own, generic = (t.double() for t in got)
    assert (own - generic).norm() <= 1e-4 * generic.norm()
    assert simulator.warnings() == ""


@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_schedules(simulator, dtype):
    """More tiles than blocks, and sums longer than the ring."""
    call = operands(Routing(600, 2, 2, "dropped"), dtype)
    run = grad_w(call, torch.randn(600, 264).to(dtype))
    with simulator.options(sms=2):
        simulator.check_schedules(run)


def test_nan_of_an_expert_stays_with_it(simulator):
    call = operands(Routing(70, 3, 1), torch.bfloat16)
    grad = torch.randn(70, 264).bfloat16()
    want = grad_w(call, grad)()
    token = int((call["topk_ids"] == 1).nonzero()[0, 0])
    call["h"][token, 0, 5] = torch.nan
    got = grad_w(call, grad)()
    assert bool(got[1, :, 5].isnan().all())
    got[1, :, 5] = want[1, :, 5]
    assert_identical(got, want)


def test_mutants_are_noticed(simulator):
    """Waits, the fence, stores and factors of the compiled kernel, broken one at a time
    (moe_linear_reduce_mutants.py)."""
    noticed = noticed_mutants("moe_linear_reduce_mutants")
    assert len(noticed) >= 5
    assert [name for name, how in noticed.items() if how is None] == []

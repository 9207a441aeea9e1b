"""Experts without computation: zero, identity and constant."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import moe_ops
from moe_ops.layers import Experts, MoE, Router, ZeroComputationExperts

T, H, I, K = 14, 6, 5, 3
NUMBERS = {
    "all": {"num_zero": 2, "num_identity": 1, "num_constant": 2},
    "zero": {"num_zero": 3},
    "identity": {"num_identity": 2},
    "constant": {"num_constant": 3},
    "none": {},
}


def make(name: str, dtype=torch.float64) -> ZeroComputationExperts:
    return ZeroComputationExperts(Experts(4, H, I, dtype=dtype), **NUMBERS[name], dtype=dtype)


def loop(bank: ZeroComputationExperts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A token and a slot at a time, from the definition."""
    real = bank.experts.outputs(x)
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            after = e - bank.num_real - bank.num_zero
            if 0 <= e < bank.num_real:
                total = total + w * real[t, e]
            elif 0 <= after < bank.num_identity:
                total = total + w * x[t]
            elif 0 <= after - bank.num_identity < bank.num_constant:
                c = after - bank.num_identity
                a, b = (bank.constant_gate[c] @ x[t]).softmax(0)
                total = total + w * (a * x[t] + b * bank.constant[c])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", NUMBERS)
def test_output_and_gradients_are_those_of_the_definition(name):
    bank = make(name)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(-1, bank.num_experts + 1, (T, K))
    ids[0] = ids[0, 0]  # An expert chosen more than once.
    y, expected = bank(x, weights, ids), loop(bank, x, weights, ids)
    torch.testing.assert_close(y, expected)
    leaves = [x, weights, *bank.parameters()]
    upstream = torch.randn_like(y)
    got = torch.autograd.grad((y * upstream).sum(), leaves, materialize_grads=True)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves, materialize_grads=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    bank = make("all")
    ids = torch.randint(bank.num_experts, (5, K))
    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: bank(x, w, ids), (x, weights))


def test_in_a_layer():
    moe = MoE(Router(H, 9, K, dtype=torch.float64), make("all"), aux_losses=("load_balancing",))
    x = torch.randn(2, 7, H, dtype=torch.float64)
    out = moe(x, return_routing=True)
    expected = loop(moe.experts, x.view(-1, H), out.topk_weights, out.topk_ids)
    torch.testing.assert_close(out.y.view(-1, H), expected)
    (out.y.square().mean() + out.aux_losses["load_balancing"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
    twin = copy.deepcopy(moe)
    twin.load_state_dict(moe.state_dict())
    torch.testing.assert_close(twin(x), out.y)
    assert moe(x[:0]).shape == (0, 7, H)


def test_loads_by_kind():
    bank = make("all")
    ids = torch.tensor([[0, 3, 4], [5, 6, 7], [8, -1, 9]])
    found = bank.tokens_per_kind(ids)
    found = {kind: int(n) for kind, n in found.items()}
    assert found == {"real": 2, "zero": 2, "identity": 1, "constant": 2}


def test_weights_on_the_input():
    bank = make("identity")
    x = torch.randn(T, H, dtype=torch.float64)
    weights = torch.rand(T, 1, dtype=torch.float64)
    ids = torch.randint(bank.num_experts, (T, 1))
    y = bank(x, weights, ids, apply_router_weight_on_input=True)
    expected = loop(bank, x * weights, torch.ones_like(weights), ids)
    torch.testing.assert_close(y, expected)
    with pytest.raises(ValueError, match=r"apply_router_weight_on_input must be False .*, got"):
        make("constant")(x, weights, ids, apply_router_weight_on_input=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    bank = make("all", dtype)
    exact = copy.deepcopy(bank).double()
    x = torch.randn(T, H).to(dtype)
    weights, ids = torch.rand(T, K), torch.randint(bank.num_experts, (T, K))
    y = bank(x, weights, ids)
    assert y.dtype == dtype
    expected = loop(exact, x.double(), weights.double(), ids)
    assert (y.double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.cpu_only
def test_batch_invariant_mode():
    bank = make("all", torch.float32)
    x, weights, ids = torch.randn(T, H), torch.rand(T, K), torch.randint(bank.num_experts, (T, K))
    with moe_ops.batch_invariant(), torch.no_grad():
        together = bank(x, weights, ids)
        alone = [bank(x[t : t + 1], weights[t : t + 1], ids[t : t + 1]) for t in range(T)]
    assert torch.equal(together, torch.cat(alone))


def test_errors():
    with pytest.raises(ValueError, match=r"num_zero must be at least 0, got -1"):
        ZeroComputationExperts(Experts(4, H, I), num_zero=-1)
    bank = make("all")
    for operation in ("select", "append", "split", "merge"):
        with pytest.raises(NotImplementedError, match="real experts"):
            getattr(bank, operation)([0])
    assert bank.pack_weights() >= 0 and bank.unpack_weights() >= 0

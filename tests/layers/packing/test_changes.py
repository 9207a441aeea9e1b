"""Packed copies of a bank's weights: the next result is always that of the weights as they are."""

from __future__ import annotations

import pytest
import torch
from tests.layers.pack_weights.banks import E, H, I, K, assert_right, is_packed, make, operands
from tests.layers.pack_weights.changes import CHANGES, adamw
from torch import nn

import moe_ops
from moe_ops.layers import MoE

# CUDA has no packed copies.
pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("policy", ["off", "always"])
def test_changed_weights_count_at_the_next_call(policy, change):
    with moe_ops.set_packing_policy(policy):
        bank = make()
        if policy == "off":
            bank.pack_weights()
        assert_right(bank)
        assert is_packed(bank)
        change(bank)
        assert_right(bank)
        assert_right(bank)
        assert is_packed(bank) == (policy == "always")


def test_a_fused_step_that_hardly_moves_anything():
    """Too few elements change for samples to find them, and fused steps count no version."""
    bank = make(torch.bfloat16)
    bank.pack_weights()
    version = bank.w_down._version
    for p in bank.parameters():
        p.grad = torch.zeros_like(p)
    bank.w_down.grad[1, 2, 3] = 100.0
    torch.optim.SGD(bank.parameters(), lr=0.1, fused=True).step()
    assert bank.w_down._version == version, "fused steps count versions now: good"
    assert not is_packed(bank)


def test_a_step_of_other_parameters_changes_nothing():
    bank, other = make(), nn.Linear(3, 3)
    bank.pack_weights()
    other(torch.randn(2, 3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert is_packed(bank)


def test_memory_of_old_weights_given_to_new_ones():
    """Storage addresses come back; what was packed for the old owner must not."""
    bank = make()
    for i in range(20):
        bank.pack_weights()
        bank.w_down = None
        bank.w_down = nn.Parameter(torch.full((E, H, I), float(i)))
        assert_right(bank)


def test_new_layout_of_the_same_numbers():
    bank = make(activation="swiglu_oai", bias=True)
    bank.pack_weights()
    bank.interleaved = True
    assert_right(bank)


def test_train_drops_the_copy():
    bank = make()
    bank.pack_weights()
    assert bank.eval() is bank
    assert is_packed(bank)
    assert bank.train() is bank
    assert not is_packed(bank)
    moe = MoE(MoE.build(H, I, E, K).router, bank).eval()
    moe.pack_weights()
    moe.train()
    assert not is_packed(moe)


def test_training_ignores_the_copy(counted):
    bank, (x, weights, ids) = make(), operands()
    bank.pack_weights()
    y = bank(x, weights, ids)
    assert y.requires_grad
    assert counted["moe_ffn_packed"] == 0
    assert not is_packed(bank)  # The weights are about to change, perhaps in a way unseen.
    grads = torch.autograd.grad(y.sum(), list(bank.parameters()))
    assert all(g is not None for g in grads)


def test_gradients_of_the_input_alone_leave_the_copy(counted):
    bank, (x, weights, ids) = make().requires_grad_(False), operands()
    bank.pack_weights()
    y = bank(x.requires_grad_(), weights, ids)
    torch.autograd.grad(y.sum(), x)
    assert counted["moe_ffn_packed"] == 0
    assert is_packed(bank)
    bank(x.detach(), weights, ids)  # Grad mode is on and nothing wants one.
    assert counted["moe_ffn_packed"] == 1


def test_a_bank_in_training_mode_is_packed_only_when_asked(counted):
    with moe_ops.set_packing_policy("always"):
        bank = make().train()
        assert_right(bank)
        assert not is_packed(bank)
        bank.pack_weights()
        assert_right(bank)
    assert counted["moe_ffn_packed"] == 1


def test_train_and_evaluate_in_turn():
    torch.manual_seed(0)
    with moe_ops.set_packing_policy("always"):
        bank, optimizer = make(), None
        optimizer = adamw(bank, fused=True)
        for _ in range(3):
            bank.train()
            x, weights, ids = operands()
            optimizer.zero_grad()
            bank(x, weights, ids).square().mean().backward()
            optimizer.step()
            bank.eval()
            assert_right(bank)
            assert is_packed(bank)

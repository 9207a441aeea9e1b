"""Packed copies on CUDA: kernels read weights as they are, so a copy changes nothing."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import check_moe_ffn, ffn_operands
from tests.helpers.routing import Routing

import moe_ops
from moe_ops.testing import assert_identical


@pytest.fixture
def call():
    return ffn_operands(Routing(11, 4, 2, "dropped"), 48, 40, torch.bfloat16, bias=True)


def with_copies(call):
    return {
        **call,
        "packed_gate_up": moe_ops.pack_experts(call["w_gate_up"], halves=True),
        "packed_down": moe_ops.pack_experts(call["w_down"]),
    }


def test_bits_are_those_of_moe_ffn(call):
    assert_identical(moe_ops.moe_ffn_packed(**with_copies(call)), moe_ops.moe_ffn(**call))
    check_moe_ffn(call)


def test_a_changed_weight_is_read(call):
    packed = with_copies(call)
    call["w_down"][1] += 1
    assert_identical(
        moe_ops.moe_ffn_packed(**{**packed, "w_down": call["w_down"]}), moe_ops.moe_ffn(**call)
    )


def test_gradients(call):
    packed = with_copies(call)
    leaves = [call[name].requires_grad_() for name in ("x", "w_gate_up", "w_down", "topk_weights")]
    grads = [
        torch.autograd.grad(y.sum(), leaves)
        for y in (moe_ops.moe_ffn_packed(**packed), moe_ops.moe_ffn(**call))
    ]
    for got, want in zip(*grads, strict=True):
        assert_identical(got, want)


@pytest.mark.parametrize("name", ["packed_gate_up", "packed_down"])
def test_a_copy_of_another_size(call, name, bad_input):
    packed = with_copies(call)
    with bad_input("moe_ffn_packed", name, "uint8 of shape ["):
        moe_ops.moe_ffn_packed(**{**packed, name: packed[name][:-1]})

"""Layers on CUDA tensors in the batch-invariant mode: what they multiply beside experts is not
cuBLAS's then."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.helpers.moe import build_moe
from torch import Tensor, nn

import moe_ops
from moe_ops.layers import Experts, GateRouter
from moe_ops.testing import assert_identical

TOKENS = 65


def moe(**options: object) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_experts": 8, "top_k": 2}
    return build_moe(**sizes | options)


LAYERS = {
    "mixtral": lambda: moe(router="mixtral"),
    "shared": lambda: moe(shared_intermediate_size=40, shared_expert_gate=True),
    "gpt-oss": lambda: moe(
        router="gpt_oss", activation="swiglu_oai", interleaved=True, bias=True, top_k=4
    ),
    "mlp-gate": lambda: GateRouter(64, 8, 2, gate="mlp", gate_size=24),
}


@pytest.fixture(autouse=True)
def invariant():
    with moe_ops.batch_invariant(), torch.no_grad():
        yield


def outputs(result: object) -> list[Tensor]:
    return [t for t in result if t is not None] if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # torch's product, on every device
    with torch.device("cpu"):
        layer, x = LAYERS[name]().bfloat16().eval(), torch.randn(TOKENS, 64).bfloat16()
    layer, x = copy.deepcopy(layer).cuda(), x.cuda()
    whole = outputs(layer(x))
    for rows in (slice(0, 1), slice(40, 41), slice(3, 10), torch.randperm(TOKENS)):
        for got, want in zip(outputs(layer(x[rows])), whole, strict=True):
            assert_identical(got, want[rows])


def test_dense_experts(monkeypatch):
    for product in ("bmm", "baddbmm", "einsum"):
        monkeypatch.setattr(torch, product, None)
    with torch.device("cpu"):
        bank, x = Experts(3, 64, 40, bias=True, activation="relu"), torch.randn(TOKENS, 64)
    bank, x = bank.cuda(), x.cuda()
    whole = bank.mix(x, x[:, :3])
    assert_identical(bank.mix(x[7:8], x[7:8, :3]), whole[7:8])

"""Routed experts in a latent width."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops import surgery
from moe_ops.layers import Experts, LatentProjection, MoE, Router, SharedExperts

T, H, L, I, E, K = 9, 12, 6, 5, 4, 2


def make(norm: bool, bias: bool = False) -> MoE:
    return MoE(
        Router(H, E, K, renormalize=True, dtype=torch.float64),
        Experts(E, L, I, activation="relu2", dtype=torch.float64),
        SharedExperts(H, I, activation="relu2", dtype=torch.float64),
        latent=LatentProjection(H, L, norm=norm, bias=bias, dtype=torch.float64),
    )


def definition(moe: MoE, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A token at a time."""
    latent, bank, shared = moe.latent, moe.experts, moe.shared_experts
    rows = []
    for t in range(len(x)):
        z = F.linear(x[t], latent.down.weight, latent.down.bias)
        total = torch.zeros_like(z)
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            total = total + w * (bank.w_down[e] @ (bank.w_gate_up[e] @ z).relu().square())
        if latent.norm is not None:
            scale = (total.square().mean() + latent.norm.eps).rsqrt()
            total = total * scale * latent.norm.weight
        y = F.linear(total, latent.up.weight, latent.up.bias)
        rows.append(y + shared.w_down @ (shared.w_gate_up @ x[t]).relu().square())
    return torch.stack(rows)


@pytest.mark.parametrize(("norm", "bias"), [(False, False), (True, True)])
def test_output_and_gradients_are_those_of_the_definition(norm, bias):
    moe = make(norm, bias)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    out = moe(x, return_routing=True)
    expected = definition(moe, x, out.topk_weights, out.topk_ids)
    torch.testing.assert_close(out.y, expected)
    upstream = torch.randn_like(expected)
    leaves = [x, *moe.parameters()]
    got = torch.autograd.grad((out.y * upstream).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_from_sizes():
    moe = MoE.build(H, I, E, K, num_shared_experts=1, latent_size=L, latent_norm=True)
    assert moe.experts.w_gate_up.shape == (E, 2 * I, L) and moe.router.weight.shape == (E, H)
    assert moe.shared_experts.w_gate_up.shape == (2 * I, H)
    x = torch.randn(2, 3, H)
    assert moe(x).shape == x.shape and moe(x[:, :0]).shape == (2, 0, H)
    assert moe.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_profile_sees_what_the_experts_see():
    moe = make(False)
    x = torch.randn(T, H, dtype=torch.float64)
    (found,) = surgery.profile_experts(moe, [x], all_outputs=True).layers.values()
    outputs = moe.experts.outputs(moe.latent.enter(x))
    # It computes in fp32.
    torch.testing.assert_close(found.output, outputs.detach().sum(0), rtol=1e-4, atol=1e-5)


def test_a_copy_keeps_the_projection():
    assert copy.deepcopy(make(True)).latent is not None


def test_operations_on_experts_keep_the_projection():
    moe = make(True)
    x = torch.randn(T, H, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    fewer = moe.select([0, 2, 3])
    torch.testing.assert_close(fewer(x), moe(x, expert_mask=mask))
    assert fewer.latent.down.weight is not moe.latent.down.weight


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LatentProjection(H, 0), "latent_size"),
        (lambda: MoE(Router(H, E, K), Experts(E, L, I), latent=LatentProjection(H, 5)), "latent"),
        (lambda: MoE(Router(L, E, K), Experts(E, L, I), latent=LatentProjection(H, L)), "latent"),
        (lambda: MoE.build(H, I, E, K, latent_norm=True), "latent_norm"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and ", got " in str(caught.value)

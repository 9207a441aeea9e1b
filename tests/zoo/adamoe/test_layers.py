"""The layer against its equations written token by token."""

from __future__ import annotations

import math

import pytest
import torch

from moe_ops.layers import SharedExperts
from moe_ops.zoo.adamoe import VARIANTS, AdaMoE, ScaledRouter, adamoe_balance_loss

T, H, I, E = 7, 6, 5, 4


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dense(x, w_gate_up, w_down):
    gate, up = (w_gate_up @ x).chunk(2)
    return w_down @ (gelu(gate) * up)


def layer(variant, top_k=2, **options):
    torch.manual_seed(0)
    made = AdaMoE(H, I, E, top_k, variant=variant, init_std=0.5, **options).double()
    if made.moe.router.scale_bias is not None:
        with torch.no_grad():
            made.moe.router.scale_bias.copy_(torch.randn(E))
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_equals_a_plain_transcription(variant, top_k):
    made = layer(variant, top_k)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    y, _ = made(x)
    router, moe = made.moe.router, made.moe
    rows = []
    for token in x:
        r = (router.weight @ token).softmax(0)
        order = sorted(range(E), key=lambda e: -r[e].item())[:top_k]
        if variant == "coupled":
            w = r
        elif variant == "additive":
            w = r + router.scale_weight @ token + router.scale_bias
        else:
            w = (router.scale_weight @ torch.cat([token, r])).softmax(0)
        routed = sum(
            w[e] * dense(token, moe.experts.w_gate_up[e], moe.experts.w_down[e]) for e in order
        )
        shared = dense(token, moe.shared_experts.w_gate_up, moe.shared_experts.w_down)
        rows.append(0.5 * shared + 0.5 * routed)
    wanted = torch.stack(rows)
    torch.testing.assert_close(y, wanted)
    parameters = [x, *made.parameters()]
    ours = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(wanted.square().sum(), parameters, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other)


def test_balance_moves_the_choice_alone():
    made = layer("additive")
    routing = made(torch.randn(T, H).double())[1]
    adamoe_balance_loss(routing).backward()
    assert made.moe.router.weight.grad.abs().sum() > 0
    assert made.moe.router.scale_weight.grad is None and made.moe.experts.w_down.grad is None


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss(top_k):
    routing = layer("coupled", top_k)(torch.randn(T, H).double())[1]
    p = routing.router_logits.detach().softmax(-1).mean(0)
    share = [float((routing.topk_ids == e).sum()) / T for e in range(E)]
    wanted = sum(f * float(q) for f, q in zip(share, p, strict=True)) / E
    assert adamoe_balance_loss(routing).item() == pytest.approx(wanted)


def test_copies_of_a_dense_network():
    torch.manual_seed(0)
    network = SharedExperts(H, I, activation="geglu_tanh")
    x = torch.randn(T, H)
    # Without routing weights r is 1/E: half of the network, and half of a quarter of it.
    plain = AdaMoE.from_dense(network, E, variant="coupled", init_std=0.0)
    torch.testing.assert_close(plain(x)[0], 0.625 * network(x))
    for top_k in (1, 2):
        kept = AdaMoE.from_dense(network, E, top_k, preserve=True, init_std=0.0)
        torch.testing.assert_close(kept(x)[0], network(x))
        kept = AdaMoE.from_dense(network, E, top_k, preserve=True)
        assert (kept(x)[0] - network(x)).norm() < 0.03 * network(x).norm()
    noisy = AdaMoE.from_dense(network, E, noise=0.01)
    difference = noisy.moe.experts.w_down - network.w_down
    assert 0.005 < difference.std() < 0.02
    assert torch.equal(noisy.moe.shared_experts.w_down, network.w_down)


def test_given_and_masked_experts():
    router = ScaledRouter(H, E, 2, init_std=0.5)
    x = torch.randn(T, H)
    free = router(x)
    again = router(x, topk_ids=free.topk_ids)
    torch.testing.assert_close(again.topk_weights, free.topk_weights)
    ids = torch.tensor([[1, -1]]).expand(T, 2)
    given = router(x, topk_ids=ids)
    wanted = router.logits(x).softmax(-1)[:, 1] + x @ router.scale_weight[1] + router.scale_bias[1]
    torch.testing.assert_close(given.topk_weights[:, 0], wanted)
    assert not given.topk_weights[:, 1].any()
    masked = router(x, expert_mask=torch.tensor([True, False, False, False]))
    assert (masked.topk_ids[:, 0] == 0).all() and not masked.topk_weights[:, 1].any()
    assert router(x[:0]).topk_weights.shape == (0, 2)


def test_what_a_scaled_router_refuses():
    with pytest.raises(ValueError, match="variant must be one of coupled, additive, concat"):
        ScaledRouter(H, E, 1, variant="other")
    with pytest.raises(ValueError, match="preserve must be False with variant 'concat'"):
        ScaledRouter(H, E, 1, variant="concat", preserve=True)
    with pytest.raises(NotImplementedError, match="no rule for it"):
        ScaledRouter(H, E, 1).select([0, 1])

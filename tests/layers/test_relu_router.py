"""ReLU routing (ReMoE): any number of experts per token, and the regularization of it."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.moe import build_moe, build_router

from moe_ops.layers import L1Coefficient, MoE, ReLURouter, relu_router_loss

T, H, I, E, K = 12, 6, 5, 8, 2


def layer(**options) -> MoE:
    moe = build_moe(H, I, E, K, dtype=torch.float64)
    moe.router = build_router(H, E, K, kind="relu", dtype=torch.float64, **options)
    return moe


def test_layer_is_its_formula():
    moe = layer(routed_scaling_factor=1.5)
    assert type(moe.router) is ReLURouter
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    out = moe(x, return_routing=True)
    weights = (x @ moe.router.weight.T).relu() * 1.5
    expected = (weights[..., None] * moe.experts.outputs(x)).sum(1)
    torch.testing.assert_close(out.y, expected)
    assert torch.equal(out.topk_ids >= 0, weights > 0)
    assert len({int(n) for n in (out.topk_ids >= 0).sum(1)}) > 1

    upstream = torch.randn_like(expected)
    leaves = [x, moe.router.weight, moe.experts.w_gate_up, moe.experts.w_down]
    got = torch.autograd.grad((out.y * upstream).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("max_k", [None, 3])
def test_gradients_of_the_choice(max_k):
    router = layer(max_k=max_k).router
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: router.route(z)[0], logits)
    weights, ids = router.route(logits)
    torch.testing.assert_close(router.weights_at(logits, ids), weights)
    assert torch.equal(router.choose(logits), ids)


def test_at_most_max_k():
    router = layer(max_k=3).router
    logits = torch.randn(40, E, dtype=torch.float64)
    weights, ids = router.route(logits)
    for row, kept, chosen in zip(logits.tolist(), weights.tolist(), ids.tolist(), strict=True):
        best = sorted((-v, e) for e, v in enumerate(row) if v > 0)[:3]
        assert chosen == [e for _, e in best] + [-1] * (3 - len(best))
        assert kept == [-v for v, _ in best] + [0.0] * (3 - len(best))
    assert router.select([0, 1]).max_k == 2
    ties = router.route(torch.ones(1, E, dtype=torch.float64))[1]
    assert ties.tolist() == [[0, 1, 2]]


def test_masks_and_no_tokens():
    moe = layer()
    x = torch.randn(T, H, dtype=torch.float64)
    mask = torch.tensor([True, False] * 4)
    out = moe(x, expert_mask=mask, return_routing=True)
    torch.testing.assert_close(out.y, moe.select([0, 2, 4, 6])(x))
    assert not (out.topk_ids % 2 == 1).logical_and(out.topk_ids >= 0).any()
    assert moe(x[:0]).shape == (0, H)
    out = moe(x, expert_mask=torch.zeros(E, dtype=torch.bool), return_routing=True)
    assert (out.topk_ids == -1).all() and (out.y == 0).all()


@pytest.mark.parametrize("balance", [False, True])
def test_loss_is_its_formula(balance):
    logits = torch.randn(3, 4, E, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) < 0.7
    loss = relu_router_loss(logits, K, balance=balance, token_mask=mask)
    rows = logits[mask].tolist()
    used = [sum(row[e] > 0 for row in rows) for e in range(E)]
    f = [E / (K * len(rows)) * n if balance else 1.0 for n in used]
    total = sum(f[e] * max(row[e], 0.0) for row in rows for e in range(E)) / len(rows)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    wanted = torch.tensor(f).double() * (logits > 0) * mask[..., None] / len(rows)
    torch.testing.assert_close(grad, wanted.double())


def test_loss_of_masked_nan_and_of_nothing():
    logits = torch.ones(3, E, requires_grad=True)
    bad = torch.cat([logits, torch.full((1, E), float("nan"))])
    loss = relu_router_loss(bad, E, token_mask=torch.tensor([True, True, True, False]))
    loss.backward()
    assert loss.item() == pytest.approx(E) and logits.grad.isfinite().all()
    assert relu_router_loss(torch.zeros(0, E), K).item() == 0
    with pytest.raises(ValueError, match=r"token_mask must have 3 elements.*, got"):
        relu_router_loss(logits, K, token_mask=torch.ones(2))


def test_coefficient_steps_towards_the_target():
    coefficient = L1Coefficient(E, K, initial=1e-4, factor=2.0)
    dense = torch.arange(E).expand(T, E)
    sparse = torch.full((T, E), -1)
    just = torch.cat([dense[:, :K], sparse[:, K:]], dim=1)
    assert coefficient.update([dense]) == 0 and coefficient.value == 2e-4
    assert coefficient.update([sparse, sparse]) == 1 and coefficient.value == 1e-4
    assert coefficient.update([just, just]) == 0.75 and coefficient.value == 1e-4
    # The mean over layers counts.
    assert coefficient.update([dense, sparse]) == 0.5 and coefficient.value == 2e-4
    assert coefficient.update([sparse[:0]]) == 0.75 and coefficient.value == 2e-4
    other = L1Coefficient(E, K)
    other.load_state_dict(coefficient.state_dict())
    assert other.value == coefficient.value
    for bad in ({"initial": 0.0}, {"factor": 1.0}):
        with pytest.raises(ValueError, match=r", got"):
            L1Coefficient(E, K, **bad)
    with pytest.raises(ValueError, match="got none"):
        coefficient.update([])


@pytest.mark.slow_on_simulator
def test_training_reaches_the_target_sparsity():
    # Without a bias, half of the centered inputs are on the positive side of any expert.
    moe = layer(bias=True)
    coefficient = L1Coefficient(E, K, initial=1e-3)
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    x = torch.randn(64, H, dtype=torch.float64)
    target = torch.randn(64, H, dtype=torch.float64)
    found = []
    for _ in range(500):
        out = moe(x, return_routing=True)
        loss = (out.y - target).square().mean()
        loss = loss + coefficient.value * relu_router_loss(out.router_logits, K)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(coefficient.update([out.topk_ids]))
    assert abs(sum(found[-100:]) / 100 - (1 - K / E)) < 0.05

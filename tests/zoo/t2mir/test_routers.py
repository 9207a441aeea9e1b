"""T2MIR's routers and their losses against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moe_ops.zoo.t2mir.routers import (
    MomentumContrast,
    NoisyTopKRouter,
    TaskRouter,
    load_probability,
    squared_cv,
)

from .common import B, E, S


def test_token_router_is_its_formula():
    router = NoisyTopKRouter(8, E, 2).double().eval()
    x = torch.randn(50, 8, dtype=torch.float64)
    weights, ids, loss = router(x)
    logits = torch.tanh(x @ router.gate[0].weight.T) @ router.gate[2].weight.T
    for t in range(50):
        first, second = logits[t].argsort(descending=True)[:2].tolist()
        assert ids[t].tolist() == [first, second]
        pair = torch.stack([logits[t, first], logits[t, second]]).exp()
        torch.testing.assert_close(weights[t], pair / pair.sum())
    assert loss == 0


@pytest.mark.parametrize("top_k", [1, 2, 5, 6])
def test_load_is_the_chance_under_fresh_noise(top_k):
    """A wrong threshold, or probabilities compared with logits, would not give this chance."""
    tokens, draws = 3, 40000
    clean = torch.randn(tokens, E, dtype=torch.float64)
    scale = 0.3 + torch.rand(tokens, E, dtype=torch.float64)
    noisy = clean + scale * torch.randn_like(clean)
    load = load_probability(clean, noisy, scale, top_k)
    for e in range(E):
        redrawn = noisy.expand(draws, -1, -1).clone()
        redrawn[:, :, e] = clean[:, e] + scale[:, e] * torch.randn(draws, tokens).double()
        chosen = (redrawn.topk(top_k, dim=-1).indices == e).any(-1).double().mean(0)
        # Four standard deviations of a share of that many draws.
        torch.testing.assert_close(load[:, e], chosen, atol=4 * 0.5 / math.sqrt(draws), rtol=0)


def test_balance_loss_is_importance_and_load():
    router = NoisyTopKRouter(8, E, 2).double()
    nn.init.normal_(router.noise.weight)
    x = torch.randn(30, 8, dtype=torch.float64)
    torch.manual_seed(4)
    weights, ids, loss = router(x)
    torch.manual_seed(4)
    clean = router.gate(x)
    scale = (1 + (x @ router.noise.weight.T).exp()).log() + 0.01
    noisy = clean + scale * torch.randn_like(clean)
    assert torch.equal(noisy.topk(2).indices, ids)
    importance = torch.stack([(weights * (ids == e)).sum() for e in range(E)])
    load = load_probability(clean, noisy, scale, 2).sum(0)
    expected = sum(v.var() / v.mean() ** 2 for v in (importance, load))
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, [router.noise.weight, router.gate[0].weight])
    assert all(g.abs().sum() > 0 and g.isfinite().all() for g in grads)
    assert squared_cv(torch.full((5,), 3.0)) == 0


@pytest.mark.parametrize("routing", ["causal", "token", "sequence"])
def test_task_router_is_its_formula(routing):
    router = TaskRouter(8, E, 2, routing=routing).double()
    x = torch.randn(B, S, 8, dtype=torch.float64)
    weights, ids, representation = router(x)
    logits = router.gate(x)
    torch.testing.assert_close(representation, logits.mean(1))
    for b in range(B):
        for t in range(S):
            span = {"causal": slice(0, t + 1), "token": slice(t, t + 1), "sequence": slice(None)}
            chosen = logits[b, span[routing]].mean(0)
            best = chosen.topk(2)
            assert ids.view(B, S, 2)[b, t].tolist() == best.indices.tolist()
            torch.testing.assert_close(weights.view(B, S, 2)[b, t], best.values.softmax(-1))
    soft = TaskRouter(8, E, 2, softmax_representation=True).double()
    soft.load_state_dict(router.state_dict())
    torch.testing.assert_close(soft(x).representation, logits.softmax(-1).mean(1))


def test_contrast_is_info_nce_both_ways():
    contrast = MomentumContrast(TaskRouter(8, E, 2)).double()
    q, k = (torch.randn(6, E, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = contrast(q, k)
    similar = q @ contrast.weight @ k.T
    total = 0.0
    for i in range(3):
        total += -(similar[i, i + 3].exp() / similar[i, 3:].exp().sum()).log()
        total += -(similar[i + 3, i].exp() / similar[i + 3, :3].exp().sum()).log()
    torch.testing.assert_close(loss, total / 6)
    loss.backward()
    assert q.grad.abs().sum() > 0 and k.grad is None
    assert contrast.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in contrast.target.parameters())


def test_slow_router_moves_by_tau():
    router = TaskRouter(8, E, 2)
    contrast = MomentumContrast(router, tau=0.25)
    before = [p.clone() for p in contrast.target.parameters()]
    for slow, fast in zip(before, router.parameters(), strict=True):
        assert torch.equal(slow, fast) and slow.data_ptr() != fast.data_ptr()
    with torch.no_grad():
        for p in router.parameters():
            p.add_(1.0)
    contrast.update(router)
    for slow, old in zip(contrast.target.parameters(), before, strict=True):
        torch.testing.assert_close(slow, old + 0.25)

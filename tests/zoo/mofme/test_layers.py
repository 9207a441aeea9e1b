"""The layer, its experts and its router against their equations written token by token."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from bench.studies.mofme.rivals import Restoration, RivalConfig
from bench.studies.mofme.training import count_parameters

from moe_ops import zoo
from moe_ops.layers import TopKRouter
from moe_ops.zoo.mofme import FiLMExperts, MoFME, UncertaintyRouter, calibrated

T, H, I, E, K, M = 7, 6, 10, 4, 2, 5


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def affine(linear, x):
    return linear.weight @ x + linear.bias


def layer(kind=MoFME, **options):
    torch.manual_seed(0)
    made = kind(H, I, E, K, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made


def tokens(seed=1):
    return torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normed(made, x):
    centered = x - x.mean()
    scaled = centered / (centered.square().mean() + 1e-5).sqrt()
    return scaled * made.norm.weight + made.norm.bias


def routed(logits):
    best = sorted(range(E), key=lambda e: -logits[e].item())[:K]
    return best, logits[best].softmax(0)


def test_equals_a_plain_transcription():
    check_equations(layer(router_dropout=0.0), film_by_hand)


def film_by_hand(made, n, best, weights):
    """The output of one token whose norm is n."""
    h = gelu(affine(made.base.a, n)) * affine(made.base.b, n)
    mixed = 0
    for e, w in zip(best, weights, strict=True):
        w1, w2 = made.experts.weight[e].chunk(2)
        b1, b2 = made.experts.bias[e].chunk(2)
        mixed = mixed + w * ((w1 @ h + b1) * h + (w2 @ h + b2))
    up, _, down = made.adaptor
    return affine(down, gelu(affine(up, mixed)))


def check_equations(made, by_hand):
    """A layer, and its gradients, equal `by_hand` at each token."""
    x = tokens().requires_grad_()
    y, routing = made(x)
    rows = []
    for token in x:
        rows.append(by_hand(made, normed(made, token), *routed(affine(made.router, token))))
    wanted = torch.stack(rows)
    torch.testing.assert_close(y, wanted)
    assert routing.topk_ids.shape == (T, K)
    parameters = [x, *made.parameters()]
    ours = torch.autograd.grad(y.square().sum(), parameters)
    theirs = torch.autograd.grad(wanted.square().sum(), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_router_equals_a_plain_transcription():
    torch.manual_seed(0)
    router = UncertaintyRouter(H, E, K, bias=True, passes=M, dropout=0.3).double()
    x = tokens()
    torch.manual_seed(5)
    routing = router(x)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x.expand(M, T, H), 0.3)
    for t in range(T):
        logits = torch.stack([affine(router, dropped[m, t]) for m in range(M)])
        best, _ = routed(logits.mean(0))
        assert routing.topk_ids[t].tolist() == best
        each = logits[:, best].softmax(1)
        weights = each.mean(0) / (1 + each.std(0, unbiased=True))
        torch.testing.assert_close(routing.topk_weights[t], weights / weights.sum())
    # An evaluation has one pass without dropout.
    plain = TopKRouter(H, E, K, bias=True, topk_first=True).double()
    plain.load_state_dict(router.state_dict())
    for found, wanted in zip(router.eval()(x), plain(x), strict=True):
        torch.testing.assert_close(found, wanted)


def test_without_dropout_training_is_plain():
    """Passes that agree change nothing: no weight vanishes where there is no uncertainty."""
    made = layer(router_dropout=0.0)
    x = tokens()
    torch.testing.assert_close(made(x)[0], made.eval()(x)[0])


def test_experts_of_which_passes_disagree_weigh_less():
    sure = torch.full((M,), 0.5, dtype=torch.float64)
    unsure = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.8], dtype=torch.float64)
    weights = calibrated(torch.stack([sure, unsure], -1)[:, None])
    spread = 1 + unsure.std()
    torch.testing.assert_close(weights[0], torch.stack([spread, spread / spread]) / (1 + spread))
    assert torch.equal(calibrated(torch.zeros(M, 1, 2)), torch.zeros(1, 2))


def test_every_expert_learns_in_training():
    made = layer(router_dropout=0.1)
    made(tokens())[0].square().sum().backward()
    used = made(tokens())[1].topk_ids.unique()
    assert bool((made.experts.weight.grad[used].flatten(1).norm(dim=1) > 0).all())
    assert made.router.weight.grad.norm() > 0


def test_router_keeps_choices_masks_and_rows():
    router = UncertaintyRouter(H, E, K, passes=3, dropout=0.2)
    x = tokens().float()
    ids = torch.tensor([[1, -1]]).expand(T, 2)
    given = router(x, topk_ids=ids)
    assert torch.equal(given.topk_weights, torch.tensor([[1.0, 0.0]]).expand(T, 2))
    mask = torch.tensor([False, True, False, False])
    assert set(router(x, expert_mask=mask).topk_ids.flatten().tolist()) == {1, -1}
    small = router.select([2, 0])
    assert (small.passes, small.dropout, small.num_experts) == (3, 0.2, 2)
    assert torch.equal(small.weight, router.weight[[2, 0]])
    assert router.draws_random_numbers and small(x).topk_ids.max() < 2


def test_slots_without_an_expert_and_no_tokens():
    bank = FiLMExperts(E, H)
    h = tokens().float()
    ids = torch.tensor([[1, -1]]).expand(T, 2)
    weights = torch.ones(T, 2)
    alone = bank(h, weights[:, :1], ids[:, :1])
    torch.testing.assert_close(bank(h, weights, ids), alone)
    assert bank(h[:0], weights[:0], ids[:0]).shape == (0, H)


def test_published_presets_have_fewer_expert_parameters():
    """The claim is of more than 72 %: 2 H^2 numbers per expert instead of 8 H^2."""
    for preset, experts in (("e4", 4), ("e8", 8), ("e16", 16)):
        with torch.device("meta"):
            film = count_parameters(zoo.create_model("mofme", preset=preset))
            config = getattr(RivalConfig, preset)()
            ffn = count_parameters(Restoration(dataclasses.replace(config, experts="ffn")))
        size = 384
        assert film["experts"] == 2 * experts * 2 * (size * size + size)
        assert ffn["experts"] == 2 * experts * (8 * size * size + 5 * size)
        assert 1 - film["experts"] / ffn["experts"] > 0.72
        # With all that is not an expert it is less, and the less the fewer experts there are.
        saved = 1 - film["total"] / ffn["total"]
        assert saved == pytest.approx({4: 0.267, 8: 0.450, 16: 0.579}[experts], abs=0.001)


def test_bad_arguments():
    with pytest.raises(ValueError, match="passes must be at least 2, got 1"):
        UncertaintyRouter(H, E, K, passes=1)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        UncertaintyRouter(H, E, K, dropout=1)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        FiLMExperts(0, H)

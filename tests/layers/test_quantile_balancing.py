"""Quantile balancing of the selection bias."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.helpers.moe import build_moe, build_router
from torch import Tensor

from moe_ops.layers import Router, TopKRouter, count_tokens_per_expert, update_expert_bias
from moe_ops.layers.router.quantile import solve_bias

H, E, K, BINS = 8, 8, 2, 4000
OPTIONS = {"score_func": "sigmoid", "expert_bias": True, "bias_bins": BINS}


def skewed(num_tokens: int = 512) -> Tensor:
    return torch.randn(num_tokens, H) + 1.0  # a common direction makes favorites


def exact(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """A token and an expert at a time, from the definition, without a histogram."""
    required = torch.empty_like(scores)
    for t, row in enumerate(scores):
        threshold = sorted((row + bias).tolist(), reverse=True)[top_k]
        required[t] = threshold - row
    solved = torch.stack([r.quantile(top_k / scores.shape[1]) for r in required.T])
    return solved - solved.mean()


def max_violation(router: Router, x: Tensor) -> float:
    load = count_tokens_per_expert(router(x).topk_ids, router.num_experts).double()
    return (load.max() / load.mean() - 1).item()


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_bias_is_the_quantile_of_the_definition(score_func):
    router = build_router(H, E, K, **{**OPTIONS, "score_func": score_func})
    router.expert_bias.uniform_(-0.2, 0.2)
    parts = [skewed(), skewed(300)]
    before, scores = router.expert_bias.clone(), []
    for x in parts:  # Histograms add up over accumulation.
        logits = router(x).router_logits
        scores.append(logits.sigmoid() if score_func == "sigmoid" else logits.softmax(-1))
    wanted = exact(torch.cat(scores).double(), before.double(), K)
    update_expert_bias(router, rule="quantile")
    # A bin is 2.4 / BINS wide, and between two tokens the quantile is a matter of definition.
    torch.testing.assert_close(router.expert_bias.double(), wanted, rtol=0, atol=6e-3)
    assert not router.bias_histogram.any() and not router.tokens_per_expert.any()


def test_few_steps_balance_a_skewed_router():
    x = skewed(1024)
    router = build_router(H, E, K, **OPTIONS)
    by_sign = copy.deepcopy(router)
    before = max_violation(router, x)
    router.bias_histogram.zero_(), router.tokens_per_expert.zero_()
    for _ in range(6):
        router(x), by_sign(x)
        update_expert_bias(router, rule="quantile")
        update_expert_bias(by_sign, rate=1e-2)
    assert before > 0.5
    assert max_violation(router, x) < 0.1
    assert max_violation(router, x) < max_violation(by_sign, x) / 2


def test_part_of_the_way():
    router = build_router(H, E, K, **OPTIONS)
    router(skewed())
    whole = copy.deepcopy(router)
    update_expert_bias(whole, rule="quantile")
    update_expert_bias(router, rule="quantile", rate=0.25)
    torch.testing.assert_close(router.expert_bias, 0.25 * whole.expert_bias)


def test_masked_experts_are_left_out():
    router = build_router(H, E, K, **OPTIONS)
    mask = torch.tensor([True] * 5 + [False] * 3)
    x = skewed()
    router(x, expert_mask=mask)
    assert router.bias_histogram.sum(1).tolist() == [len(x)] * 5 + [0] * 3
    router(x, expert_mask=torch.arange(E) < K)  # No expert of these tokens has a rival.
    assert router.bias_histogram.sum() == 5 * len(x)


def test_what_is_not_counted():
    router = build_router(H, E, K, **OPTIONS).eval()
    router(skewed())
    router.train()(torch.empty(0, H))
    assert not router.bias_histogram.any()
    update_expert_bias(router, rule="quantile")
    assert not router.expert_bias.any()
    everything = build_router(H, E, E, **OPTIONS)
    everything(skewed())
    update_expert_bias(everything, rule="quantile")
    assert not everything.expert_bias.any()


def test_recomputation_is_counted_once():
    moe = build_moe(H, 4, E, K, freeze_routing_in_recompute=True, **OPTIONS)
    x = skewed(20).requires_grad_()
    torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False).sum().backward()
    assert moe.router.bias_histogram.sum() == 20 * E


def test_solve_bias_inside_a_bin():
    """Half of a bin's tokens are half of its width."""
    histogram = torch.zeros(2, 4, dtype=torch.int64)
    histogram[0, 1] = histogram[1, 3] = 10
    low, width = -1.0, 0.5
    solved = solve_bias(histogram, torch.zeros(2), 1)
    wanted = torch.tensor([low + 1.5 * width, low + 3.5 * width])
    torch.testing.assert_close(solved, wanted - wanted.mean())


def test_histogram_follows_its_router():
    router = build_router(H, E, K, **OPTIONS)
    assert "bias_histogram" not in router.state_dict()
    assert copy.deepcopy(router).half().bias_histogram.dtype == torch.int64
    fewer = router.select([0, 3, 5])
    assert fewer.bias_bins == BINS and fewer.bias_histogram.shape == (3, BINS)
    assert (
        build_router(H, E, K, device="meta", **OPTIONS).to_empty(device="cpu").bias_histogram.sum()
        == 0
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TopKRouter(H, E, K, bias_bins=10), "expert_bias"),
        (lambda: TopKRouter(H, E, K, expert_bias=True, bias_bins=-1), "bias_bins"),
        (
            lambda: build_router(H, E, K, **{**OPTIONS, "score_func": "sqrtsoftplus"}),
            "scores in [0, 1]",
        ),
        (lambda: build_router(H, E, K, **{**OPTIONS, "num_groups": 4}), "groups"),
        (
            lambda: update_expert_bias(TopKRouter(H, E, K, expert_bias=True), rule="quantile"),
            "bias_bins",
        ),
        (lambda: update_expert_bias(build_router(H, E, K, **OPTIONS), rule="median"), "rule"),
        (
            lambda: update_expert_bias(build_router(H, E, K, **OPTIONS), rule="quantile", rate=2),
            "rate",
        ),
        (lambda: update_expert_bias(torch.zeros(3), torch.ones(3), rule="quantile"), "rule"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and ", got " in str(caught.value)

from __future__ import annotations

import pytest
import torch
from tests.helpers.logits import logit_spread

import moe_ops
from moe_ops import reference
from moe_ops.reference._scores import SCORE_FUNCS
from moe_ops.testing import DTYPES, assert_close_by_norm, assert_identical, short

BIAS = torch.linspace(-1, 1, 256).roll(77)
DEEPSEEK = {
    "score_func": "sigmoid",
    "renormalize": True,
    "num_groups": 8,
    "num_topk_groups": 4,
    "group_score": "top2_sum",
    "expert_bias": BIAS,
}


@pytest.mark.parametrize(
    ("e", "k", "options"),
    [
        (60, 4, {"renormalize": True}),
        (256, 8, DEEPSEEK),
        (12, 3, {"num_groups": 2}),
        (1300, 70, {"topk_first": True, "num_groups": 13, "num_topk_groups": 4}),
    ],
    ids=["registers", "groups-of-lanes", "groups", "memory"],
)
def test_schedules(simulator, e, k, options):
    logits = torch.randn(9, e).bfloat16().requires_grad_()
    grad = torch.randn(9, k)

    def call():
        weights, ids = moe_ops.topk_router(logits, k, **options)
        return weights, ids, *torch.autograd.grad(weights, logits, grad)

    simulator.check_schedules(call)


def distinct_logits(t, e, dtype):
    """Logits of a line that no rounding can bring together, half of them below zero."""
    step = torch.arange(e, dtype=torch.float64) - e // 2
    return torch.stack([step[torch.randperm(e)] for _ in range(t)]).div(256).to(dtype)


def check(logits, k, options):
    wide = logits.detach().double().requires_grad_()
    expected, expected_ids = reference.topk_router(wide, k, **options)
    leaf = logits.detach().requires_grad_()
    weights, ids = moe_ops.topk_router(leaf, k, **options)
    assert_identical(ids, expected_ids)
    magnitude = expected.detach().abs() * logit_spread(logits)
    assert_close_by_norm(weights, expected, magnitude, sum_length=logits.shape[1])
    grad = torch.randn(expected.shape).to(weights.dtype)
    (want,) = torch.autograd.grad(expected, wide, grad.double())
    (got,) = torch.autograd.grad(weights, leaf, grad)
    magnitude = grad.double().abs().sum(1, keepdim=True) * logit_spread(logits)
    assert_close_by_norm(got, want, magnitude, sum_length=logits.shape[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
@pytest.mark.parametrize("score_func", SCORE_FUNCS)
@pytest.mark.parametrize("topk_first", [False, True], ids=["score-first", "topk-first"])
@pytest.mark.parametrize(
    ("e", "k"), [(1024, 64), (1025, 3), (1500, 65), (300, 8), (257, 65), (96, 96)]
)
def test_around_the_limits_of_registers(e, k, topk_first, score_func, dtype):
    options = {"topk_first": topk_first, "score_func": score_func, "renormalize": True}
    check(distinct_logits(5, e, dtype), k, options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize(
    ("e", "k", "groups", "kept"),
    [
        (256, 8, 32, 3),
        (1024, 8, 64, 3),  # groups inside a lane
        (250, 8, 125, 7),  # more groups than lanes
        (1000, 8, 500, 7),
        (1024, 40, 4, 2),
        (1280, 8, 10, 4),  # keys in memory
        (1500, 70, 300, 40),
        (90, 66, 3, 3),
    ],
)
def test_groups(e, k, groups, kept, group_score, dtype):
    options = {
        "score_func": "sigmoid",
        "num_groups": groups,
        "num_topk_groups": kept,
        "group_score": group_score,
    }
    check(distinct_logits(3, e, dtype), k, options)


def test_more_tokens_than_warps_with_a_workspace():
    """Each warp takes its workspace for several tokens."""
    logits = distinct_logits(2100, 1025, torch.float32)
    _, ids = moe_ops.topk_router(logits, 1, num_groups=25, num_topk_groups=2)
    assert_identical(ids[:, 0], logits.argmax(1).int())


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("score_func", "topk_first"), [*((name, False) for name in SCORE_FUNCS), ("softmax", True)]
)
@pytest.mark.parametrize(("e", "k"), [(5, 4), (200, 40), (1030, 70)])
def test_gradient_of_any_ids(e, k, score_func, topk_first, dtype, id_dtype):
    """Ids of the caller: some name no expert, some name one twice."""
    logits = torch.randn(7, e).to(dtype)
    ids = torch.randint(-1, e, (7, k), dtype=id_dtype)
    ids[:, 3] = ids[:, 0]
    ids[0] = -1
    ids[1, 1:] = e + 3
    grad = torch.randn(7, k).to(torch.float64 if dtype == torch.float64 else torch.float32)
    got = torch.ops.moe_ops.topk_router_bwd(grad, logits, ids, score_func, topk_first, True, 1.5)

    wide = logits.double().requires_grad_()
    used = (ids >= 0) & (ids < e)
    index = torch.where(used, ids, 0).long()
    if topk_first:
        scores = torch.where(used, wide.gather(1, index), -torch.inf)
        scores = torch.where(used, scores.softmax(1).nan_to_num(), 0)
    else:
        scores = SCORE_FUNCS[score_func](wide).gather(1, index)
    scores = torch.where(used, scores, 0)
    weights = 1.5 * scores / (scores.sum(1, keepdim=True) + 1e-20)
    (want,) = torch.autograd.grad(weights, wide, grad.double())
    want = want.nan_to_num()
    magnitude = grad.double().abs().sum(1, keepdim=True) * logit_spread(logits)
    assert_close_by_norm(got, want, magnitude, sum_length=e)
    assert bool((got[0] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(("e", "k"), [(60, 4), (128, 8), (512, 10)])
def test_bytes(simulator, e, k, dtype):
    """csrc/cuda/NOTES.md has the formula."""
    t, size = 13, dtype.itemsize
    logits = torch.randn(t, e).to(dtype).requires_grad_()
    counted = simulator.counted(
        lambda: moe_ops.topk_router(logits, k, renormalize=True), "ld_bytes", "st_bytes"
    )
    assert counted == {"ld_bytes": t * size * (e + k), "st_bytes": t * 8 * k}

    weights, _ = moe_ops.topk_router(logits, k, renormalize=True)
    grad = torch.randn(t, k)
    counted = simulator.counted(
        lambda: torch.autograd.grad(weights, logits, grad), "ld_bytes", "st_bytes"
    )
    assert counted == {
        "ld_bytes": t * (size * (e + k) + 8 * k),
        "st_bytes": t * size * e,
    }

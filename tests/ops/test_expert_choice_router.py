from __future__ import annotations

import pytest
import torch
from tests.helpers.logits import decided_logits, logit_spread, random_logits
from tests.helpers.op_case import OpCase

import moe_ops
from moe_ops import reference
from moe_ops.reference._scores import SCORE_FUNCS
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    acc_dtype,
    as_strided_copy,
    assert_close_by_norm,
    assert_identical,
    poisoned,
    short,
)

OP_CASES = {
    "expert_choice_router": OpCase(
        lambda s: {"router_logits": s.float(s.t, s.e), "capacity": s.k},
        free_dims={"router_logits": {0, 1}},
        bad_arguments={"capacity": (-1, -(2**62)), "score_func": ("", "exp")},
        too_many_bytes=lambda: moe_ops.expert_choice_router(torch.ones(4).expand(2**60, 4), 4),
    )
}
# (T, E, capacity)
SIZES = (
    (0, 4, 2),
    (1, 1, 1),
    (3, 2, 1),
    (7, 3, 3),
    (17, 7, 2),
    (5, 8, 5),
    (33, 16, 4),
    (31, 17, 9),
    (65, 33, 3),
    (129, 5, 30),
    (97, 1, 50),
    (6, 129, 2),
    (257, 3, 128),
)
score_funcs = pytest.mark.parametrize("score_func", SCORE_FUNCS)


def decided(t, e, capacity, dtype, score_func="softmax", kind="normal"):
    def decide(logits, factor):
        return reference.expert_choice_router(logits * factor, capacity, score_func=score_func)[1]

    return decided_logits(lambda: random_logits(t, e, dtype, kind), decide)


def check(logits, capacity, **options):
    wide = logits.detach().double().requires_grad_()
    expected, expected_ids = reference.expert_choice_router(wide, capacity, **options)
    leaf = logits.detach().requires_grad_()
    with poisoned(leaf, expected, expected_ids):
        weights, ids = moe_ops.expert_choice_router(leaf, capacity, **options)
    assert_identical(ids, expected_ids, "topk_ids")
    assert weights.dtype == acc_dtype(logits.dtype)
    assert bool((weights[ids < 0] == 0).all()), "an unused slot has a weight"
    e = logits.shape[1]
    magnitude = expected.detach().abs() * logit_spread(logits)
    assert_close_by_norm(weights, expected, magnitude, sum_length=e, what="weights")

    grad = torch.randn(expected.shape).to(weights.dtype)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    with poisoned(leaf):
        (grad_logits,) = torch.autograd.grad(weights, leaf, grad)
    assert grad_logits.dtype == logits.dtype
    scale = abs(options.get("routed_scaling_factor", 1.0))
    magnitude = scale * grad.double().abs().sum(1, keepdim=True) * logit_spread(logits)
    assert_close_by_norm(
        grad_logits, expected_grad, magnitude, sum_length=e, what="gradient of router_logits"
    )


@score_funcs
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("t", "e", "capacity"), SIZES)
def test_sizes(t, e, capacity, dtype, score_func):
    logits = decided(t, e, capacity, dtype, score_func)
    check(logits, capacity, score_func=score_func, routed_scaling_factor=1.5)


@score_funcs
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("capacity", [9, 10, 1000])
def test_capacity_of_every_token_and_more(capacity, dtype, score_func):
    logits = torch.randn(9, 5).to(dtype)
    _, ids = moe_ops.expert_choice_router(logits, capacity, score_func=score_func)
    assert_identical(ids, torch.arange(5, dtype=torch.int32).expand(9, 5), "topk_ids")
    check(logits, capacity, score_func=score_func)


@score_funcs
@pytest.mark.parametrize("capacity", [1, 4, 7])
def test_each_expert_takes_its_capacity(capacity, score_func):
    """The contract itself: every expert is exactly full, and its tokens are its best ones."""
    logits = torch.randn(40, 6)
    _, ids = moe_ops.expert_choice_router(logits, capacity, score_func=score_func)
    scores = SCORE_FUNCS[score_func](logits)
    taken = torch.zeros(40, 7, dtype=torch.bool).scatter(1, ids.long() % 7, ids >= 0)[:, :6]
    assert taken.sum(0).tolist() == [capacity] * 6
    worst = torch.where(taken, scores, torch.inf).amin(0)
    best_left = torch.where(taken, -1, scores).amax(0)
    assert bool((worst >= best_left - 1e-6).all())
    padded = torch.where(ids < 0, 99, ids)
    assert bool((padded.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("num_tokens", [5, 33, 130])
@score_funcs
def test_equal_tokens_take_the_smaller(score_func, num_tokens, dtype):
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=dtype).repeat(num_tokens, 1)
    _, ids = moe_ops.expert_choice_router(logits, 3, score_func=score_func)
    assert ids[:3].tolist() == [[0, 1, 2]] * 3
    assert bool((ids[3:] == -1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_tied_logits_by_sigmoid(dtype):
    logits = random_logits(37, 5, dtype, "tied")
    check(logits, 8, score_func="sigmoid")


@score_funcs
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_token_is_taken_last(dtype, score_func):
    logits = decided(8, 3, 4, dtype, score_func)
    logits[2] = torch.nan
    _, expected_ids = reference.expert_choice_router(logits.double(), 4, score_func=score_func)
    weights, ids = moe_ops.expert_choice_router(logits, 4, score_func=score_func)
    assert ids[2].tolist() == [-1, -1, -1]
    assert_identical(ids, expected_ids, "topk_ids")
    assert not weights.isnan().any()


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_views(dtype, view):
    logits = decided(9, 13, 3, dtype)
    check(as_strided_copy(logits, view), 3)


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_gradient_views(view):
    logits = torch.randn(9, 13, requires_grad=True)
    grad = as_strided_copy(torch.randn(9, 13), view)
    weights, _ = moe_ops.expert_choice_router(logits, 3)
    (got,) = torch.autograd.grad(weights, logits, grad, retain_graph=True)
    (want,) = torch.autograd.grad(weights, logits, grad.contiguous())
    assert_identical(got, want, "gradient of router_logits")


@score_funcs
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_gradcheck(capacity, score_func):
    logits = decided(5, 4, capacity, torch.float64, score_func).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: moe_ops.expert_choice_router(t, capacity, score_func=score_func)[0], logits
    )


def test_double_backward_says_so():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights, _ = moe_ops.expert_choice_router(logits, 2)
    (grad,) = torch.autograd.grad(weights.pow(2).sum(), logits, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="expert_choice_router"):
        torch.autograd.grad(grad.sum(), logits)


@score_funcs
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad, score_func):
    logits = torch.randn(6, 4).to(dtype).requires_grad_(requires_grad)
    torch.library.opcheck(
        torch.ops.moe_ops.expert_choice_router.default, (logits, 2), {"score_func": score_func}
    )


@score_funcs
def test_compile(score_func):
    logits = torch.randn(6, 4, requires_grad=True)
    compiled = torch.compile(
        lambda t: moe_ops.expert_choice_router(t, 2, score_func=score_func),
        fullgraph=True,
        backend="aot_eager",
    )
    got = compiled(logits)
    want = moe_ops.expert_choice_router(logits, 2, score_func=score_func)
    assert_identical(got[0], want[0], "weights")
    assert_identical(got[1], want[1], "topk_ids")
    grad = torch.randn(6, 4)
    assert_identical(*(torch.autograd.grad(w, logits, grad)[0] for w in (got[0], want[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_autocast_does_not_round_logits(dtype):
    logits = torch.randn(65, 16).to(dtype)
    want = moe_ops.expert_choice_router(logits, 9)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe_ops.expert_choice_router(logits, 9)
    assert_identical(got[0], want[0], "weights")
    assert_identical(got[1], want[1], "topk_ids")


@pytest.mark.cpu_only
@score_funcs
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, score_func, set_threads):
    logits = torch.randn(700, 16).to(dtype).requires_grad_()
    grad = torch.randn(700, 16).to(acc_dtype(dtype))
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        weights, ids = moe_ops.expert_choice_router(logits, 90, score_func=score_func)
        runs.append((weights, ids, torch.autograd.grad(weights, logits, grad)[0]))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize(
    ("logits", "capacity", "options", "name", "got"),
    [
        (torch.zeros(8), 2, {}, "router_logits", "[8]"),
        (torch.zeros(3, 8, 1), 2, {}, "router_logits", "[3, 8, 1]"),
        (torch.zeros(3, 8, dtype=torch.int32), 2, {}, "router_logits", "int32"),
        (torch.zeros(3, 8), -1, {}, "capacity", "-1"),
        (torch.zeros(3, 8), 0, {}, "capacity", "0"),
        (torch.zeros(3, 0), 1, {}, "router_logits", "[3, 0]"),
        (torch.zeros(3, 8), 2, {"score_func": "relu"}, "score_func", "relu"),
    ],
    ids=["1d", "3d", "int", "negative", "zero", "no-experts", "score"],
)
def test_bad_input(logits, capacity, options, name, got, bad_input):
    with bad_input("expert_choice_router", name, got):
        moe_ops.expert_choice_router(logits, capacity, **options)

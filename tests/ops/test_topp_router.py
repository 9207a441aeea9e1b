from __future__ import annotations

import pytest
import torch
from tests.helpers.logits import decided_logits, logit_spread, random_logits
from tests.helpers.op_case import OpCase

import moe_ops
from moe_ops import reference
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
    "topp_router": OpCase(
        lambda s: {"router_logits": s.float(s.t, s.e), "top_p": 0.5, "max_k": s.k},
        free_dims={"router_logits": {0, 1}},
        bad_arguments={
            "top_p": (0.0, -0.5, 1.0001, float("nan"), float("inf"), -float("inf")),
            "max_k": (0, -1, 99, 2**62),
            "min_k": (-1, 99, 2**62),
        },
        by_token=("router_logits",),
        too_many_bytes=lambda: moe_ops.topp_router(torch.ones(4).expand(2**60, 4), 0.5, 4),
    )
}
# (T, E)
SIZES = (
    (0, 4),
    (1, 1),
    (3, 2),
    (7, 3),
    (17, 7),
    (5, 8),
    (9, 17),
    (4, 31),
    (6, 33),
    (8, 64),
    (3, 129),
    (2, 257),
)


def decided(t, e, dtype, top_p, max_k=None, *, kind="normal", **options):
    def decide(logits, factor):
        return reference.topp_router(logits, top_p * factor, max_k, **options)[1]

    lines = [decided_logits(lambda: random_logits(1, e, dtype, kind), decide) for _ in range(t)]
    return torch.cat(lines) if lines else torch.zeros(0, e, dtype=dtype)


def check(logits, *arguments, **options):
    wide = logits.detach().double().requires_grad_()
    expected, expected_ids = reference.topp_router(wide, *arguments, **options)
    leaf = logits.detach().requires_grad_()
    with poisoned(leaf, expected, expected_ids):
        weights, ids = moe_ops.topp_router(leaf, *arguments, **options)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("t", "e"), SIZES)
def test_sizes(t, e, dtype):
    check(decided(t, e, dtype, 0.7), 0.7)


@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalize"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", ["normal", "tied", "skewed"])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.6, 0.95])
def test_top_p(top_p, kind, dtype, renormalize):
    logits = decided(9, 13, dtype, top_p, kind=kind)
    check(logits, top_p, renormalize=renormalize, routed_scaling_factor=1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("e", [1, 2, 6, 13])
def test_all_of_the_probability_takes_every_expert(e, dtype):
    logits = decided(5, e, dtype, 1.0)
    _, ids = moe_ops.topp_router(logits, 1.0)
    assert ids.shape == (5, e)
    assert bool((ids >= 0).all())
    check(logits, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(
    ("min_k", "max_k"), [(1, 1), (1, 3), (3, 3), (2, 13), (13, 13), (5, 8), (1, 13)]
)
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.99])
def test_least_and_most(top_p, min_k, max_k, dtype):
    logits = decided(9, 13, dtype, top_p, max_k, min_k=min_k)
    check(logits, top_p, max_k, min_k=min_k, renormalize=True)
    _, ids = moe_ops.topp_router(logits, top_p, max_k, min_k=min_k)
    used = (ids >= 0).sum(1)
    assert ids.shape == (9, max_k)
    assert bool((used >= min_k).all())


def test_max_k_defaults_to_every_expert():
    logits = decided(9, 13, torch.float32, 0.9)
    for got, want in zip(
        moe_ops.topp_router(logits, 0.9), moe_ops.topp_router(logits, 0.9, 13), strict=True
    ):
        assert_identical(got, want)


def test_shortest_prefix_by_hand():
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64)
    weights, ids = moe_ops.topp_router(probs.log(), 0.8)
    assert ids.tolist() == [[1, 3, 2, -1], [0, -1, -1, -1]]
    torch.testing.assert_close(weights[0, :3], torch.tensor([0.5, 0.25, 0.15]).double())
    assert weights[1].tolist()[1:] == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_ties_take_the_smaller_id(dtype):
    _, ids = moe_ops.topp_router(torch.zeros(2, 8, dtype=dtype), 0.3)
    assert ids.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_logits_leave_valid_ids(dtype):
    logits = torch.randn(3, 6).to(dtype)
    logits[1, 2] = torch.nan
    weights, ids = moe_ops.topp_router(logits, 0.5)
    assert bool(((ids >= -1) & (ids < 6)).all())
    assert bool((ids[:, 0] >= 0).all())
    used = ids[1][ids[1] >= 0].tolist()
    assert len(set(used)) == len(used)
    assert not weights[[0, 2]].isnan().any()
    assert bool(weights[1, 0].isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_masked_experts_come_last(dtype):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.5]], dtype=dtype)
    weights, ids = moe_ops.topp_router(logits, 0.9)
    assert ids.tolist() == [[1, 3, -1, -1]]
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_views(dtype, view):
    check(as_strided_copy(decided(9, 13, dtype, 0.6), view), 0.6)


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_gradient_views(view):
    logits = torch.randn(9, 13, requires_grad=True)
    grad = as_strided_copy(torch.randn(9, 4), view)
    weights, _ = moe_ops.topp_router(logits, 0.8, 4)
    (got,) = torch.autograd.grad(weights, logits, grad, retain_graph=True)
    (want,) = torch.autograd.grad(weights, logits, grad.contiguous())
    assert_identical(got, want, "gradient of router_logits")


@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalize"])
@pytest.mark.parametrize("max_k", [None, 2])
def test_gradcheck(max_k, renormalize):
    logits = decided(4, 6, torch.float64, 0.7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: moe_ops.topp_router(t, 0.7, max_k, renormalize=renormalize)[0], logits
    )


def test_double_backward_says_so():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weights, _ = moe_ops.topp_router(logits, 0.7)
    (grad,) = torch.autograd.grad(weights.pow(2).sum(), logits, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="topp_router"):
        torch.autograd.grad(grad.sum(), logits)


@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalize"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad, renormalize):
    logits = torch.randn(5, 8).to(dtype).requires_grad_(requires_grad)
    torch.library.opcheck(
        torch.ops.moe_ops.topp_router.default,
        (logits, 0.6, 4),
        {"min_k": 2, "renormalize": renormalize},
    )


@pytest.mark.parametrize("max_k", [None, 3])
def test_compile(max_k):
    logits = torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(
        lambda t: moe_ops.topp_router(t, 0.7, max_k), fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(logits), moe_ops.topp_router(logits, 0.7, max_k)
    assert_identical(got[0], want[0], "weights")
    assert_identical(got[1], want[1], "topk_ids")
    grad = torch.randn_like(want[0])
    assert_identical(*(torch.autograd.grad(w, logits, grad)[0] for w in (got[0], want[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_autocast_does_not_round_logits(dtype):
    logits = torch.randn(33, 64).to(dtype)
    want = moe_ops.topp_router(logits, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe_ops.topp_router(logits, 0.5)
    assert_identical(got[0], want[0], "weights")
    assert_identical(got[1], want[1], "topk_ids")


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    logits = torch.randn(700, 64).to(dtype).requires_grad_()
    grad = torch.randn(700, 20).to(acc_dtype(dtype))
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        weights, ids = moe_ops.topp_router(logits, 0.5, 20)
        runs.append((weights, ids, torch.autograd.grad(weights, logits, grad)[0]))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize(
    ("logits", "top_p", "max_k", "options", "name", "got"),
    [
        (torch.zeros(8), 0.5, 2, {}, "router_logits", "[8]"),
        (torch.zeros(3, 8, dtype=torch.int32), 0.5, 2, {}, "router_logits", "int32"),
        (torch.zeros(3, 8), 0.0, 2, {}, "top_p", "0"),
        (torch.zeros(3, 8), -0.25, 2, {}, "top_p", "-0.25"),
        (torch.zeros(3, 8), 1.5, 2, {}, "top_p", "1.5"),
        (torch.zeros(3, 8), float("nan"), 2, {}, "top_p", "nan"),
        (torch.zeros(3, 8), 0.5, 0, {}, "max_k", "0"),
        (torch.zeros(3, 8), 0.5, 9, {}, "max_k", "9"),
        (torch.zeros(3, 8), 0.5, -1, {}, "max_k", "-1"),
        (torch.zeros(3, 8), 0.5, 2, {"min_k": 3}, "min_k", "3"),
        (torch.zeros(3, 8), 0.5, 2, {"min_k": -1}, "min_k", "-1"),
        (torch.zeros(3, 8), 0.5, 2, {"min_k": 0}, "min_k", "0"),
    ],
    ids=lambda v: str(v) if isinstance(v, (str, int, float)) else "",
)
def test_bad_input(logits, top_p, max_k, options, name, got, bad_input):
    with bad_input("topp_router", name, got):
        moe_ops.topp_router(logits, top_p, max_k, **options)

"""topk_router.

The file is long because keys, scores, groups and ties each have cases of their own.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

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
    "topk_router": OpCase(
        lambda s: {"router_logits": s.float(s.t, s.e), "top_k": s.k, "expert_bias": None},
        free_dims={"router_logits": {0, 1}},
        bad_arguments={
            "top_k": (0, -1, 99, 2**31, 2**62, -(2**62)),
            "score_func": ("", "Softmax", "tanh"),
            "num_groups": (0, -1, 97, 2**40),
            "num_topk_groups": (0, -3, 2, 2**40),
        },
        by_token=("router_logits",),
        too_many_bytes=lambda: moe_ops.topk_router(torch.ones(4).expand(2**60, 4), 4),
    )
}
# (T, E, K)
SIZES = (
    (0, 4, 2),
    (0, 1, 1),
    (1, 1, 1),
    (3, 2, 1),
    (7, 3, 3),
    (17, 7, 2),
    (5, 8, 8),
    (33, 16, 4),
    (71, 4, 2),
    (130, 8, 2),
    (65, 16, 2),
    (9, 17, 5),
    (4, 31, 31),
    (6, 33, 6),
    (31, 60, 4),
    (8, 64, 6),
    (3, 65, 9),
    (5, 97, 8),
    (12, 128, 8),
    (2, 129, 1),
    (7, 256, 8),
    (2, 257, 16),
    (3, 512, 10),
    (1, 1000, 100),
)
OPTIONS = {
    "softmax": {},
    "softmax-renormalize": {"renormalize": True},
    "softmax-scaled": {"routed_scaling_factor": 2.5},
    "topk-first": {"topk_first": True},
    "topk-first-renormalize": {"topk_first": True, "renormalize": True},
}
for score in [name for name in SCORE_FUNCS if name != "softmax"]:
    options = {"score_func": score}
    renormalize = {**options, "renormalize": True}
    OPTIONS |= {
        score: options,
        f"{score}-renormalize": {**renormalize, "routed_scaling_factor": 0.5},
        f"topk-first-{score}": {**options, "topk_first": True},
        f"topk-first-{score}-renormalize": {
            **renormalize,
            "topk_first": True,
            "routed_scaling_factor": 3.0,
        },
    }
option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
DEEPSEEK_V3 = {
    "score_func": "sigmoid",
    "renormalize": True,
    "routed_scaling_factor": 2.5,
    "num_groups": 8,
    "num_topk_groups": 4,
    "group_score": "top2_sum",
}


def decided(t, e, k, dtype, options, kind="normal"):
    """Logits whose experts do not depend on rounding, each line drawn on its own."""

    def decide(logits, factor):
        scaled = dict(options)
        if "expert_bias" in scaled:
            scaled["expert_bias"] = scaled["expert_bias"].double() * factor
        return reference.topk_router(logits * factor, k, **scaled)[1]

    lines = [decided_logits(lambda: random_logits(1, e, dtype, kind), decide) for _ in range(t)]
    return torch.cat(lines) if lines else torch.zeros(0, e, dtype=dtype)


def check(logits, k, options):
    """Ids exactly, weights and the gradient of the logits within the rounding of softmax."""
    wide = logits.detach().double().requires_grad_()
    wide_options = dict(options)
    if options.get("expert_bias") is not None:
        wide_options["expert_bias"] = options["expert_bias"].double()
    expected, expected_ids = reference.topk_router(wide, k, **wide_options)
    leaf = logits.detach().requires_grad_()
    with poisoned(leaf, expected, expected_ids):
        weights, ids = moe_ops.topk_router(leaf, k, **options)
    assert_identical(ids, expected_ids, "topk_ids")
    assert weights.dtype == acc_dtype(logits.dtype)
    e = logits.shape[1]
    assert_close_by_norm(
        weights,
        expected,
        expected.detach().abs() * logit_spread(logits),
        sum_length=e,
        what="weights",
    )

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
    if options.get("topk_first") or options.get("score_func", "softmax") != "softmax":
        chosen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, ids.long(), True)
        assert bool((grad_logits[~chosen] == 0).all()), "an expert not chosen has a gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("t", "e", "k"), SIZES)
def test_sizes(t, e, k, dtype):
    check(decided(t, e, k, dtype, {}), k, {"renormalize": True})


@option
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", ["normal", "tied", "skewed"])
def test_options(kind, dtype, options):
    check(decided(9, 13, 4, dtype, options, kind), 4, options)


@option
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
def test_wide_logits(dtype, options):
    """Some probabilities underflow, none of the weights may become NaN."""
    logits = random_logits(9, 13, dtype, "wide")
    weights, ids = moe_ops.topk_router(logits, 3, **options)
    assert bool(weights.isfinite().all())
    assert_identical(ids, reference.topk_router(logits, 3, **options)[1], "topk_ids")


@option
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_expert_bias(dtype, bias_dtype, options):
    """The bias chooses and never weighs."""
    bias = torch.randn(13).to(bias_dtype)
    if dtype != torch.float64:
        bias = bias.float().to(bias_dtype)
    options = {**options, "expert_bias": bias}
    check(decided(9, 13, 4, dtype, options), 4, options)


@pytest.mark.parametrize("view", ["step2", "offset"])
def test_expert_bias_views(view):
    options = {"score_func": "sigmoid", "expert_bias": torch.randn(13)}
    logits = decided(9, 13, 4, torch.float32, options)
    want = moe_ops.topk_router(logits, 4, **options)
    options["expert_bias"] = as_strided_copy(options["expert_bias"], view)
    got = moe_ops.topk_router(logits, 4, **options)
    assert_identical(got[0], want[0], "weights")
    assert_identical(got[1], want[1], "topk_ids")


@pytest.mark.parametrize("with_bias", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("score_func", SCORE_FUNCS)
@pytest.mark.parametrize("topk_first", [False, True], ids=["score-first", "topk-first"])
@pytest.mark.parametrize(
    ("e", "k", "groups", "kept"),
    [(8, 2, 4, 2), (8, 4, 4, 2), (12, 3, 2, 1), (64, 6, 8, 3), (16, 4, 4, 4), (9, 2, 3, 2)],
)
def test_groups(e, k, groups, kept, topk_first, score_func, group_score, with_bias):
    options = {
        "score_func": score_func,
        "topk_first": topk_first,
        "num_groups": groups,
        "num_topk_groups": kept,
        "group_score": group_score,
    }
    if with_bias:
        options["expert_bias"] = torch.randn(e)
    check(decided(7, e, k, torch.float32, options), k, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_deepseek_v3(kind, dtype):
    options = {**DEEPSEEK_V3, "expert_bias": torch.randn(256) / 4}
    check(decided(3, 256, 8, dtype, options, kind), 8, options)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_negative_keys_do_not_lose_to_dropped_groups(group_score):
    """A dropped group's key must rank below any number, not count as zero."""
    options = {
        "score_func": "sigmoid",
        "num_groups": 4,
        "num_topk_groups": 1,
        "group_score": group_score,
        "expert_bias": torch.full((16,), -5.0),
    }
    logits = torch.randn(9, 16)
    _, ids = moe_ops.topk_router(logits, 4, **options)
    assert bool((ids // 4 == ids[:, :1] // 4).all())
    assert_identical(ids, reference.topk_router(logits, 4, **options)[1], "topk_ids")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("e", [1, 2, 7, 8, 16, 33, 64, 129, 256])
def test_all_equal_takes_the_smallest_ids(e, dtype):
    k = min(e, 6)
    weights, ids = moe_ops.topk_router(torch.full((3, e), 0.25, dtype=dtype), k)
    assert_identical(ids, torch.arange(k, dtype=torch.int32).expand(3, k), "topk_ids")
    assert bool((weights == weights[0, 0]).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_minus_zero_ties_with_zero(dtype):
    logits = torch.tensor([[-1.0, 0.0, -0.0, 0.0, -0.0]], dtype=dtype)
    assert moe_ops.topk_router(logits, 4)[1].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("groups", [1, 4])
def test_equal_groups_take_the_smaller(groups, dtype):
    logits = torch.zeros(2, 8, dtype=dtype)
    options = {"num_groups": groups, "num_topk_groups": max(1, groups // 2)}
    assert moe_ops.topk_router(logits, 4, **options)[1].tolist() == [[0, 1, 2, 3]] * 2


@option
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("e", "k"), [(4, 2), (8, 2), (7, 3), (16, 2)])
def test_many_tokens_of_few_experts(e, k, dtype, options):
    """More than one block of tokens in lanes, and a last vector that is not full."""
    check(decided(75, e, k, dtype, options), k, options)


@pytest.mark.parametrize(("e", "k"), [(4, 2), (8, 2), (5, 5), (16, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_order_of_few_experts(dtype, e, k):
    """Ties, both zeros, infinities and NaN in every place of many tokens."""
    values = torch.tensor([-1.0, -0.0, 0.0, 2.0, torch.inf, -torch.inf, torch.nan])
    logits = values[torch.randint(len(values), (150, e))].to(dtype)
    ids = moe_ops.topk_router(logits, k)[1]
    assert_identical(ids, reference.topk_router(logits.double(), k)[1], "topk_ids")


@pytest.mark.parametrize(("e", "k"), [(4, 2), (8, 2), (6, 4), (16, 2)])
@pytest.mark.parametrize("options", [{}, {"renormalize": True}, {"topk_first": True}], ids=str)
def test_gradients_of_slots_without_an_expert(options, e, k):
    """Backward gives them none, whatever their gradient is; one expert may stand in two slots."""
    logits, ids = torch.randn(70, e), torch.randint(-1, e, (70, k), dtype=torch.int32)
    ids[3], ids[4], ids[5] = -1, 0, torch.arange(k)
    grad = torch.randn(70, k)
    arguments = ("softmax", options.get("topk_first", False), options.get("renormalize", False))
    bwd = torch.ops.moe_ops.topk_router_bwd
    got = bwd(grad.masked_fill(ids < 0, torch.nan), logits, ids, *arguments, 1.5)
    assert bool((got[3] == 0).all())
    wide = logits.double().requires_grad_()
    valid, at = ids >= 0, ids.clamp(min=0).long()
    if options.get("topk_first"):
        chosen = wide.gather(1, at).masked_fill(~valid, -1e30)
        weights = chosen.softmax(1) * valid
    else:
        weights = wide.softmax(1).gather(1, at) * valid
    if options.get("renormalize"):
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    (want,) = torch.autograd.grad(weights * 1.5, wide, grad.double())
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=2e-6)


@option
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("where", ["one", "most", "all"])
def test_nan_logits(where, dtype, options):
    """NaN ranks last; ids stay valid and distinct; the weights are what arithmetic gives."""
    logits = decided(3, 7, 4, dtype, options)
    logits[1, {"one": [2], "most": [0, 1, 2, 4, 6], "all": list(range(7))}[where]] = torch.nan
    expected, expected_ids = reference.topk_router(logits.double(), 4, **options)
    weights, ids = moe_ops.topk_router(logits, 4, **options)
    assert_identical(ids, expected_ids, "topk_ids")
    assert bool(((ids >= 0) & (ids < 7)).all())
    assert all(len(set(line)) == 4 for line in ids.tolist())
    assert_close_by_norm(weights, expected, expected.abs() * logit_spread(logits), sum_length=7)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_nan_logits_in_groups_leave_valid_distinct_ids(group_score):
    logits = torch.randn(6, 16)
    logits[0, 3] = torch.nan
    logits[1, :8] = torch.nan
    logits[2] = torch.nan
    _, ids = moe_ops.topk_router(
        logits, 4, num_groups=4, num_topk_groups=2, group_score=group_score, score_func="sigmoid"
    )
    assert bool(((ids >= 0) & (ids < 16)).all())
    assert all(len(set(line)) == 4 for line in ids.tolist())
    assert all(len({i // 4 for i in line}) <= 2 for line in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("score_func", SCORE_FUNCS)
def test_masked_experts(score_func, dtype):
    """A logit of -inf is the usual mask: weight zero, chosen only when nothing else is left."""
    logits = decided(4, 6, 3, dtype, {})
    logits[0, :2] = -torch.inf
    logits[1, :5] = -torch.inf
    weights, ids = moe_ops.topk_router(logits, 3, score_func=score_func)
    expected, expected_ids = reference.topk_router(logits.double(), 3, score_func=score_func)
    assert_identical(ids, expected_ids, "topk_ids")
    assert_close_by_norm(weights, expected, expected.abs() * logit_spread(logits), sum_length=6)
    assert weights[1, 1:].tolist() == [0, 0]


def exact_sqrtsoftplus(x):
    """The score and its slope, from the formula with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        x = Decimal(x)
        e = (-abs(x)).exp() if abs(x) < 10**6 else Decimal(0)
        # log(1 + e) has no digits left where e is below 1e-60: there it is e.
        log = (1 + e).ln() if e > Decimal("1e-20") else e * (1 - e / 2)
        score = (max(x, 0) + log).sqrt()
        return score, (1 if x > 0 else e) / (1 + e) / (2 * score)


@pytest.mark.parametrize("kernel", ["lanes", "rows", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_sqrtsoftplus_of_any_logit(dtype, kernel):
    """To a few ulps from where exp(logit / 2) is a normal number up to the largest logit."""
    limits = torch.finfo(dtype)
    least = 2 * math.log(limits.tiny) + 5
    logits = [least, -104.0, -88.0, -41.0, -40.0, -39.0, -17.0, -5.0, -1.0, -0.5, -1e-3, -1e-9, 0.0]
    logits += [-x for x in logits if x > -100] + [1e10, limits.max]
    logits = torch.tensor(logits, dtype=dtype)[:, None]
    if kernel == "rows":
        logits = torch.cat([logits, logits.expand(-1, 16) - 1 - logits.abs()], 1)
    logits.requires_grad_()
    route = reference.topk_router if kernel == "reference" else moe_ops.topk_router
    weights, _ = route(logits, 1, score_func="sqrtsoftplus")
    (slopes,) = torch.autograd.grad(weights.sum(), logits)
    for x, score, slope in zip(*(t[:, 0].tolist() for t in (logits, weights, slopes)), strict=True):
        for got, want in zip((score, slope), exact_sqrtsoftplus(x), strict=True):
            # Plain torch in fp32 rounds more often.
            steps = 8 if kernel != "reference" else 16
            assert abs(Decimal(got) - want) <= steps * Decimal(limits.eps) * want, x


@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalize"])
@pytest.mark.parametrize("e", [5, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sqrtsoftplus_that_is_zero(dtype, e, renormalize):
    """Score and gradient are zero, and no NaN, where the score is too small for a number."""
    logits = torch.full((2, e), -3000.0, dtype=dtype)
    logits[1] = -torch.inf
    logits.requires_grad_()
    options = {"score_func": "sqrtsoftplus", "renormalize": renormalize}
    for route in (moe_ops.topk_router, reference.topk_router):
        weights, ids = route(logits, 3, **options)
        assert ids.tolist() == [[0, 1, 2]] * 2
        assert not weights.any()
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        assert not grad.any()


@pytest.mark.parametrize("e", [5, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sqrtsoftplus_of_infinity(dtype, e):
    logits = torch.zeros(1, e, dtype=dtype)
    logits[0, 2] = torch.inf
    logits.requires_grad_()
    weights, _ = moe_ops.topk_router(logits, 2, score_func="sqrtsoftplus")
    assert weights[0, 0] == torch.inf
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert grad[0, 2] == 0 and bool(grad.isfinite().all())


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_views(dtype, view):
    logits = as_strided_copy(decided(9, 13, 4, dtype, {}), view)
    check(logits, 4, {"renormalize": True})


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_gradient_views(view):
    logits = decided(9, 13, 4, torch.float32, {}).requires_grad_()
    grad = as_strided_copy(torch.randn(9, 4), view)
    weights, _ = moe_ops.topk_router(logits, 4)
    (got,) = torch.autograd.grad(weights, logits, grad, retain_graph=True)
    (want,) = torch.autograd.grad(weights, logits, grad.contiguous())
    assert_identical(got, want, "gradient of router_logits")


def test_ids_carry_no_gradient():
    weights, ids = moe_ops.topk_router(torch.randn(3, 4, requires_grad=True), 2)
    assert weights.requires_grad
    assert not ids.requires_grad


@pytest.mark.parametrize("score_func", SCORE_FUNCS)
def test_expert_bias_gets_no_gradient(score_func):
    logits = torch.randn(3, 4, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    weights, _ = moe_ops.topk_router(logits, 2, score_func=score_func, expert_bias=bias)
    grads = torch.autograd.grad(weights.pow(2).sum(), (logits, bias), allow_unused=True)
    assert bool((grads[0] != 0).any())
    assert grads[1] is None or not grads[1].any()


@option
def test_gradcheck(options):
    logits = decided(4, 6, 3, torch.float64, options).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: moe_ops.topk_router(t, 3, **options)[0], logits)


def test_gradcheck_deepseek_v3():
    options = {**DEEPSEEK_V3, "expert_bias": torch.randn(32, dtype=torch.float64)}
    logits = decided(3, 32, 4, torch.float64, options).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: moe_ops.topk_router(t, 4, **options)[0], logits)


def test_double_backward_says_so():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weights, _ = moe_ops.topk_router(logits, 3)
    (grad,) = torch.autograd.grad(weights.pow(2).sum(), logits, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="topk_router"):
        torch.autograd.grad(grad.sum(), logits)


@option
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck(requires_grad, options):
    logits = torch.randn(5, 8, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.topk_router.default, (logits, 3), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_opcheck_bias_and_groups(dtype):
    logits = torch.randn(5, 32).to(dtype).requires_grad_()
    options = {**DEEPSEEK_V3, "expert_bias": torch.randn(32)}
    torch.library.opcheck(torch.ops.moe_ops.topk_router.default, (logits, 3), options)


@option
def test_compile(options):
    logits = torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(
        lambda t: moe_ops.topk_router(t, 3, **options), fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(logits), moe_ops.topk_router(logits, 3, **options)
    assert_identical(got[0], want[0], "weights")
    assert_identical(got[1], want[1], "topk_ids")
    grad = torch.randn(5, 3)
    assert_identical(*(torch.autograd.grad(w, logits, grad)[0] for w in (got[0], want[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=short)
def test_autocast_does_not_round_logits(dtype):
    """Routing in bf16 would change the chosen experts."""
    logits = torch.randn(33, 64).to(dtype)
    want = moe_ops.topk_router(logits, 4)
    with torch.autocast("cpu", torch.bfloat16):
        weights, ids = moe_ops.topk_router(logits, 4)
    assert weights.dtype == torch.float32
    assert_identical(ids, want[1], "topk_ids")
    assert_identical(weights, want[0], "weights")


@pytest.mark.cpu_only
@option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_same_bits_for_any_thread_count(dtype, options, set_threads):
    logits = torch.randn(700, 64).to(dtype).requires_grad_()
    grad = torch.randn(700, 6)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        weights, ids = moe_ops.topk_router(logits, 6, **options)
        runs.append((weights, ids, torch.autograd.grad(weights, logits, grad)[0]))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize("e", [7, 16, 61, 128])
def test_a_token_does_not_depend_on_its_batch(e):
    logits = torch.randn(19, e)
    weights, ids = moe_ops.topk_router(logits, 4)
    alone = [moe_ops.topk_router(line[None], 4) for line in logits]
    assert_identical(weights, torch.cat([w for w, _ in alone]), "weights")
    assert_identical(ids, torch.cat([i for _, i in alone]), "topk_ids")


GOOD = (torch.zeros(3, 8), 2)


@pytest.mark.parametrize(
    ("logits", "top_k", "options", "name", "got"),
    [
        (torch.zeros(8), 2, {}, "router_logits", "[8]"),
        (torch.zeros(3, 8, 1), 2, {}, "router_logits", "[3, 8, 1]"),
        (torch.zeros(3, 8, dtype=torch.int64), 2, {}, "router_logits", "int64"),
        (torch.zeros(3, 8, dtype=torch.complex64), 2, {}, "router_logits", "complex64"),
        (torch.zeros(3, 0), 1, {}, "router_logits", "[3, 0]"),
        (torch.zeros(3, 8), 0, {}, "top_k", "0"),
        (torch.zeros(3, 8), 9, {}, "top_k", "9"),
        (torch.zeros(3, 8), -1, {}, "top_k", "-1"),
        (torch.zeros(3, 8), 2**40, {}, "top_k", str(2**40)),
        (*GOOD, {"score_func": "tanh"}, "score_func", "tanh"),
        (*GOOD, {"expert_bias": torch.zeros(7)}, "expert_bias", "[7]"),
        (*GOOD, {"expert_bias": torch.zeros(1, 8)}, "expert_bias", "[1, 8]"),
        (*GOOD, {"expert_bias": torch.zeros(8, dtype=torch.int32)}, "expert_bias", "int32"),
        (*GOOD, {"num_groups": 3}, "num_groups", "3"),
        (*GOOD, {"num_groups": 0}, "num_groups", "0"),
        (*GOOD, {"num_groups": -2}, "num_groups", "-2"),
        (*GOOD, {"num_groups": 4, "num_topk_groups": 5}, "num_topk_groups", "5"),
        (*GOOD, {"num_groups": 4, "num_topk_groups": 0}, "num_topk_groups", "0"),
        (torch.zeros(3, 8), 3, {"num_groups": 4, "num_topk_groups": 1}, "", ""),
        (
            *GOOD,
            {"num_groups": 4, "num_topk_groups": 2, "group_score": "sum"},
            "group_score",
            "sum",
        ),
    ],
    ids=lambda v: str(v) if isinstance(v, (str, int)) else "",
)
def test_bad_input(logits, top_k, options, name, got, bad_input):
    with bad_input("topk_router", name, got):
        moe_ops.topk_router(logits, top_k, **options)


@pytest.mark.parametrize("e", [3, 18, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_expert_is_named_though_logits_are_nan(dtype, e):
    """NaN ranks below all numbers, and above what fills up the last vector of a row."""
    logits = torch.full((3, e), torch.nan, dtype=dtype)
    logits[1, e // 2] = 1
    logits[2, :2] = -torch.inf
    _, ids = moe_ops.topk_router(logits, e)
    assert_identical(ids, reference.topk_router(logits, e)[1], "topk_ids")
    assert_identical(ids.sort(1).values, torch.arange(e, dtype=torch.int32).expand(3, e))

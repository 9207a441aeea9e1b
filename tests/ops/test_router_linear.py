from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.op_case import OpCase

import moe_ops
from moe_ops import reference
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)

OP_CASES = {
    "router_linear": OpCase(
        lambda s: {"x": s.float(s.t, s.h), "weight": s.float(s.e, s.h), "bias": s.float(s.e)},
        free_dims={"x": {0}},
        bad_arguments={"logits_dtype": (torch.int32, torch.bool, torch.float8_e4m3fn)},
        mixed_floats=(),
        by_token=("x",),
        twice=True,
        too_many_bytes=lambda: moe_ops.router_linear(torch.empty(2**40, 0), torch.empty(2**22, 0)),
    )
}
HALVES = [torch.bfloat16, torch.float16]
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])


def operands(tokens, hidden, experts, dtype=torch.float32, bias=True):
    call = {
        "x": torch.randn(tokens, hidden).to(dtype),
        "weight": torch.randn(experts, hidden).to(dtype),
    }
    if bias:
        call["bias"] = torch.randn(experts).to(dtype)
    return call


def check(call, **kwargs):
    tokens, hidden = call["x"].shape
    check_against_reference(
        moe_ops.router_linear,
        reference.router_linear,
        call,
        list(call),
        # Of x along the tokens and the experts, of logits along H.
        sum_length=max(tokens, hidden, call["weight"].shape[0]) + 1,
        **kwargs,
    )


@BIAS
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_values(dtype, bias):
    check(operands(23, 37, 6, dtype, bias))


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 8, 13, 16, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_experts(dtype, experts):
    check(operands(10, 32, experts, dtype))


@pytest.mark.parametrize("hidden", [1, 2, 7, 8, 15, 16, 17, 33, 64, 97, 128, 129, 300, 2050])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
def test_hidden_sizes(dtype, hidden):
    check(operands(7, hidden, 5, dtype))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 63, 64, 65, 511, 512, 700])
@pytest.mark.parametrize("experts", [4, 5])
def test_tokens(tokens, experts):
    """Sums over tokens go in parts of at least 256."""
    check(operands(tokens, 48, experts))


@BIAS
@pytest.mark.parametrize("sizes", [(0, 6, 3), (4, 0, 3), (0, 0, 1)], ids=str)
def test_nothing(sizes, bias):
    call = operands(*sizes, bias=bias)
    leaves = {k: v.requires_grad_() for k, v in call.items()}
    logits = moe_ops.router_linear(**leaves)
    assert_identical(logits, reference.router_linear(**leaves))
    logits.sum().backward()
    for name, t in leaves.items():
        assert t.grad.shape == t.shape
        want = float(sizes[0]) if name == "bias" else 0.0
        assert bool((t.grad == want).all()), name


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("hidden", [16, 17])
def test_views(dtype, view, hidden):
    call = operands(9, hidden, 4, dtype)
    for name in ("x", "weight"):
        call[name] = as_strided_copy(call[name], view)
    check(call, grad_view=view)


def test_rows_and_vectors_of_any_stride():
    call = operands(6, 16, 4)
    call["x"] = torch.randn(6, 3, 16)[:, 1]
    call["bias"] = torch.randn(4, 2)[:, 1]
    check(call)
    call["x"], call["bias"] = torch.randn(1, 16).expand(6, 16), torch.randn(1).expand(4)
    check(call)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_float32_logits(dtype):
    """Those of half operands are their float32 product, and float32 gradients go back as such."""
    call = operands(40, 72, 5, dtype)
    results = []
    for fn, widen in ((moe_ops.router_linear, False), (F.linear, True)):
        leaves = [t.clone().requires_grad_() for t in call.values()]
        if widen:
            logits = fn(*(t.float() for t in leaves))
        else:
            logits = fn(*leaves, logits_dtype=torch.float32)
            assert logits.dtype == torch.float32
        torch.manual_seed(1)
        grad = torch.randn(logits.shape)
        grads = torch.autograd.grad(logits, leaves, grad)
        assert [g.dtype for g in grads] == [dtype] * 3
        results.append((logits, *grads))
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        tolerance = 1e-5 if i == 0 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=40 * tolerance)


def test_logits_dtype_of_its_own():
    call = operands(4, 8, 3)
    want = moe_ops.router_linear(**call)
    assert_identical(moe_ops.router_linear(**call, logits_dtype=torch.float32), want)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_one_gradient_wanted(name, dtype):
    call = operands(70, 21, 6, dtype)
    grads = []
    for fn in (moe_ops.router_linear, reference.router_linear):
        leaf = call[name].clone().requires_grad_()
        logits = fn(**{**call, name: leaf})
        grads.append(torch.autograd.grad(logits.float().square().sum(), leaf)[0])
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(*grads, rtol=tolerance, atol=20 * tolerance)


@BIAS
def test_gradcheck(bias):
    leaves = [t.requires_grad_() for t in operands(3, 10, 5, torch.float64, bias).values()]
    assert torch.autograd.gradcheck(moe_ops.router_linear, leaves)


@BIAS
def test_gradgradcheck(bias):
    leaves = [t.requires_grad_() for t in operands(3, 6, 5, torch.float64, bias).values()]
    assert torch.autograd.gradgradcheck(moe_ops.router_linear, leaves)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_second_derivative_of_one(name):
    """The second derivative is right where the first derivative of one operand alone is asked
    for."""
    call = operands(5, 6, 3, torch.float64)
    results = []
    for fn in (moe_ops.router_linear, reference.router_linear):
        leaves = {k: v.clone().requires_grad_() for k, v in call.items()}
        logits = fn(**leaves)
        (grad,) = torch.autograd.grad((logits**3).sum(), leaves[name], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), list(leaves.values())))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@BIAS
@pytest.mark.parametrize("sizes", [(4, 6, 3), (0, 6, 3), (5, 16, 4)], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck(requires_grad, sizes, bias):
    args = [t.requires_grad_(requires_grad) for t in operands(*sizes, bias=bias).values()]
    torch.library.opcheck(torch.ops.moe_ops.router_linear.default, tuple(args))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, False)])
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32], ids=short)
def test_opcheck_half(logits_dtype, needs):
    x, weight, bias = operands(4, 6, 3, torch.bfloat16).values()
    torch.library.opcheck(torch.ops.moe_ops.router_linear.default, (x, weight, bias, logits_dtype))
    grad = torch.randn(4, 3).to(logits_dtype)
    torch.library.opcheck(torch.ops.moe_ops.router_linear_bwd.default, (grad, x, weight, *needs))


@BIAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype, bias):
    leaves = [t.requires_grad_() for t in operands(7, 34, 5, dtype, bias).values()]
    compiled = torch.compile(moe_ops.router_linear, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (compiled, moe_ops.router_linear):
        logits = fn(*leaves)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert_identical(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_autocast(dtype):
    """The op acts as F.linear does: in the autocast type, but fp64 stays."""
    call = operands(5, 8, 3, dtype)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = moe_ops.router_linear(**call)
    target = dtype if dtype == torch.float64 else torch.bfloat16
    assert got.dtype == target
    assert_identical(got, moe_ops.router_linear(**{k: v.to(target) for k, v in call.items()}))


@pytest.mark.cpu_only
@pytest.mark.parametrize("sizes", [(3000, 97, 5), (4096, 256, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, sizes, set_threads):
    leaves = [t.requires_grad_() for t in operands(*sizes, dtype).values()]
    grad = torch.randn(sizes[0], sizes[2]).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        logits = moe_ops.router_linear(*leaves)
        runs.append((logits, *torch.autograd.grad(logits, leaves, grad)))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad):
    """Neither padded experts nor a tile's other tokens see it."""
    call = operands(6, 18, 5)
    call["x"][2, 3] = bad
    logits = moe_ops.router_linear(**call)
    assert not logits[2].isfinite().any()
    rest = [0, 1, 3, 4, 5]
    assert logits[rest].isfinite().all()
    call["x"].requires_grad_()
    (grad,) = torch.autograd.grad(moe_ops.router_linear(**call).sum(), call["x"])
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4)}, ["x", "[4]"]),
        ({"x": torch.zeros(1, 2, 4)}, ["x", "[1, 2, 4]"]),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, ["x", "int32"]),
        ({"weight": torch.zeros(3, 5)}, ["weight", "[3, 5]"]),
        ({"weight": torch.zeros(4)}, ["weight", "[4]"]),
        ({"weight": torch.zeros(0, 4)}, ["num_experts", "0"]),
        ({"weight": torch.zeros(3, 4).double()}, ["weight", "float64"]),
        ({"bias": torch.zeros(4)}, ["bias", "[4]"]),
        ({"bias": torch.zeros(3, 1)}, ["bias", "[3, 1]"]),
        ({"bias": torch.zeros(3).half()}, ["bias", "float16"]),
        ({"logits_dtype": torch.float64}, ["logits_dtype", "float64"]),
        ({"logits_dtype": torch.bfloat16}, ["logits_dtype", "bfloat16"]),
        ({"logits_dtype": torch.int32}, ["logits_dtype", "int32"]),
    ],
    ids=str,
)
def test_bad_input(change, words, bad_input):
    call = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), **change}
    with bad_input("router_linear", *words):
        moe_ops.router_linear(**call)

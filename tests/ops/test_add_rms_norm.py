from __future__ import annotations

import pytest
import torch
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
    "add_rms_norm": OpCase(
        lambda s: {
            "x": s.float(s.t, s.h),
            "weight": s.float(s.h),
            "residual": s.float(s.t, s.h),
            "bias": s.float(s.h),
        },
        bad_arguments={"eps": (-1e-6, float("nan"))},
        mixed_floats=(),
        by_token=("x", "residual"),
    )
}
ADDENDS = pytest.mark.parametrize(
    "addends", [(), ("residual",), ("bias",), ("residual", "bias")], ids="+".join
)


def operands(*shape, dtype=torch.float32, addends=("residual", "bias"), **options):
    call = {"x": torch.randn(shape).to(dtype), "weight": torch.randn(shape[-1]).to(dtype)}
    if "residual" in addends:
        call["residual"] = torch.randn(shape).to(dtype)
    if "bias" in addends:
        call["bias"] = torch.randn(shape[-1]).to(dtype)
    return {**call, **options}


def tensors(call):
    return [name for name, value in call.items() if isinstance(value, torch.Tensor)]


def check(call, **kwargs):
    """Both results and all gradients, as one tensor [2, ..., H]."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    total = reference.add_rms_norm(**wide)[1]
    square = total.square().mean(-1, keepdim=True)
    scale = torch.rsqrt(square + call.get("eps", 1e-6))

    def magnitude(x, weight, residual=None, bias=None, eps=None):
        # The gradient of y = s r w is r w grad - s r^3 / H <grad, w s>. With r held fixed, both
        # terms come from s r w (1 + r^2 mean(s^2) / 2) where nothing is negative.
        s = x
        for t in (residual, bias):
            s = s if t is None else s + t
        y = s * scale * weight * (1 + scale**2 * s.square().mean(-1, keepdim=True) / 2)
        return torch.stack((y, s.expand_as(y)))

    check_against_reference(
        lambda **call: torch.stack(moe_ops.add_rms_norm(**call)),
        lambda **call: torch.stack(reference.add_rms_norm(**call)),
        call,
        tensors(call),
        magnitude=magnitude,
        sum_length=call["x"][..., 0].numel(),
        steps=1,
        grad_steps=3,
        **kwargs,
    )


@ADDENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_values(dtype, addends):
    check(operands(23, 37, dtype=dtype, addends=addends))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 15, 16, 17, 33, 64, 97, 129, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_sizes(dtype, size):
    check(operands(5, size, dtype=dtype, eps=1e-2))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 200])
def test_rows(rows):
    """Sums over rows go in parts of 64."""
    check(operands(rows, 18))


@pytest.mark.parametrize("shape", [(5,), (1, 8), (2, 3, 10), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_shapes(dtype, shape):
    check(operands(*shape, dtype=dtype))


@ADDENDS
@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0,)], ids=str)
def test_nothing(shape, addends):
    call = operands(*shape, addends=addends)
    leaves = {k: v.requires_grad_() for k, v in call.items()}
    y, total = moe_ops.add_rms_norm(**leaves)
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    for name, t in leaves.items():
        assert t.grad.shape == t.shape
        assert bool((t.grad == 0).all()), name


@pytest.mark.parametrize("eps", [0.0, 1e-5, 3.0])
def test_eps(eps):
    check(operands(7, 24, eps=eps))


def test_zeros():
    y, total = moe_ops.add_rms_norm(torch.zeros(3, 20), torch.ones(20))
    assert_identical(y, torch.zeros(3, 20))
    assert_identical(total, torch.zeros(3, 20))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_views(dtype, view):
    call = operands(9, 17, dtype=dtype)
    for name in ("x", "residual"):
        call[name] = as_strided_copy(call[name], view)
    check(call, grad_view=view)


def test_vectors_of_any_stride():
    call = operands(4, 6)
    call["weight"], call["bias"] = torch.randn(6, 2)[:, 1], torch.randn(1).expand(6)
    check(call)


def test_without_addends_the_sum_is_x():
    x = torch.randn(3, 8)
    assert moe_ops.add_rms_norm(x, torch.ones(8))[1] is x


def test_equals_torch():
    call = operands(33, 64)
    y, total = moe_ops.add_rms_norm(**call, eps=1e-5)
    want = call["x"] + call["residual"] + call["bias"]
    assert_identical(total, want)
    torch.testing.assert_close(
        y, torch.nn.functional.rms_norm(want, (64,), call["weight"], 1e-5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("used", ["y", "sum"])
def test_one_result_used(used):
    call = operands(6, 12)
    leaves = {k: v.requires_grad_() for k, v in call.items()}
    wants = []
    for fn in (moe_ops.add_rms_norm, reference.add_rms_norm):
        out = fn(**leaves)[0 if used == "y" else 1]
        wants.append(
            torch.autograd.grad(
                out.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        )
    for got, want in zip(*wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["x", "weight", "residual", "bias"])
def test_one_gradient_wanted(name):
    call = operands(70, 12)
    call[name].requires_grad_()
    grads = []
    for fn in (moe_ops.add_rms_norm, reference.add_rms_norm):
        y, total = fn(**call)
        out = y.square().sum() + (total**3).sum()
        grads.append(torch.autograd.grad(out, call[name])[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


@ADDENDS
def test_gradcheck(addends):
    call = operands(3, 10, dtype=torch.float64, addends=addends)
    names = tensors(call)
    leaves = [call[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *args: moe_ops.add_rms_norm(**dict(zip(names, args, strict=True))), leaves
    )


@pytest.mark.cpu_only
def test_double_backward_says_so():
    call = operands(3, 10)
    call["x"].requires_grad_()
    y, _ = moe_ops.add_rms_norm(**call)
    (grad,) = torch.autograd.grad(y.sum(), call["x"], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="add_rms_norm"):
        torch.autograd.grad(grad.sum(), call["x"])


@ADDENDS
@pytest.mark.parametrize("shape", [(6,), (4, 6), (0, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck(requires_grad, shape, addends):
    call = operands(*shape, addends=addends)
    args = [call.get(name) for name in ("x", "weight", "residual", "bias")]
    for t in args:
        if t is not None:
            t.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.add_rms_norm.default, (*args, 1e-5))


@ADDENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype, addends):
    call = operands(7, 34, dtype=dtype, addends=addends)
    leaves = {k: v.requires_grad_() for k, v in call.items()}
    compiled = torch.compile(
        lambda call: moe_ops.add_rms_norm(**call), fullgraph=True, backend="aot_eager"
    )
    results = []
    for fn in (compiled, lambda call: moe_ops.add_rms_norm(**call)):
        y, total = fn(leaves)
        grads = torch.autograd.grad((y * total).sum(), list(leaves.values()))
        results.append((y, total, *grads))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=short)
def test_autocast_keeps_the_dtype(dtype):
    call = operands(5, 8, dtype=dtype)
    want = moe_ops.add_rms_norm(**call)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = moe_ops.add_rms_norm(**call)
    for a, b in zip(got, want, strict=True):
        assert_identical(a, b)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    call = operands(1500, 97, dtype=dtype)
    leaves = {k: v.requires_grad_() for k, v in call.items()}
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        y, total = moe_ops.add_rms_norm(**leaves)
        grads = torch.autograd.grad((y * total).sum(), list(leaves.values()))
        runs.append((y, total, *grads))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(())}, ["x", "[]"]),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, ["x", "int32"]),
        ({"weight": torch.zeros(5)}, ["weight", "[5]"]),
        ({"weight": torch.zeros(4, 1)}, ["weight", "[4, 1]"]),
        ({"weight": torch.zeros(4).double()}, ["weight", "float64"]),
        ({"residual": torch.zeros(2, 5)}, ["residual", "[2, 5]"]),
        ({"residual": torch.zeros(4)}, ["residual", "[4]"]),
        ({"residual": torch.zeros(2, 4).half()}, ["residual", "float16"]),
        ({"bias": torch.zeros(3)}, ["bias", "[3]"]),
        ({"eps": -1.0}, ["eps", "-1"]),
        ({"eps": float("nan")}, ["eps", "nan"]),
    ],
    ids=str,
)
def test_bad_input(change, words, bad_input):
    call = {"x": torch.zeros(2, 4), "weight": torch.zeros(4), **change}
    with bad_input("add_rms_norm", *words):
        moe_ops.add_rms_norm(**call)

from __future__ import annotations

import pytest
import torch
from tests.helpers.op_case import OpCase, ones

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
    "rotary": OpCase(
        lambda s: {
            "t": s.float(s.o, s.t, s.e, 2 * s.h),
            "cos": s.float(s.t, s.h),
            "sin": s.float(s.t, s.h),
        },
        free_dims={"t": {0, 2}},
        twice=True,
        too_many_bytes=lambda: moe_ops.rotary(
            torch.ones(2, dtype=torch.float64).expand(2**60, 1, 2),
            *[ones(1, 1, dtype=torch.float64)] * 2,
        ),
    )
}


def operands(*shape, dtype=torch.float32, batched=False, **options):
    """A call with angles of all sizes, one per token and pair of features."""
    lead = shape[:2] if batched else shape[1:2]
    angles = 7 * torch.randn(*lead, shape[-1] // 2, dtype=torch.float64)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "t": torch.randn(shape).to(dtype),
        "cos": angles.cos().to(acc),
        "sin": angles.sin().to(acc),
        **options,
    }


def magnitude(t, cos, sin, inverse=False):
    shape = cos.shape[:-1] + (1,) * (t.dim() - 3) + cos.shape[-1:]
    cos, sin = cos.view(shape), sin.view(shape)
    a, b = t.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos + a * sin), dim=-1)


def check(call, **kwargs):
    check_against_reference(
        moe_ops.rotary, reference.rotary, call, ["t"], magnitude=magnitude, **kwargs
    )


@pytest.mark.parametrize("inverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_values(dtype, batched, inverse):
    check(operands(2, 5, 2, 3, 16, dtype=dtype, batched=batched, inverse=inverse))


@pytest.mark.parametrize("size", [2, 6, 8, 16, 30, 32, 34, 64, 66, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_sizes(dtype, size):
    check(operands(2, 3, 3, size, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 6), (1, 4, 1, 8), (2, 3, 2, 2, 2, 4)], ids=str)
def test_shapes(shape):
    check(operands(*shape))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)], ids=str)
def test_nothing(shape):
    call = operands(*shape)
    call["t"].requires_grad_()
    out = moe_ops.rotary(**call)
    assert out.shape == shape
    out.sum().backward()
    assert call["t"].grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=short)
def test_angles_of_another_type(dtype):
    call = operands(2, 5, 3, 8)
    call["cos"], call["sin"] = call["cos"].to(dtype), call["sin"].to(dtype)
    check(call)


@pytest.mark.parametrize("grad_view", VIEWS)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, grad_view):
    call = operands(2, 9, 3, 16)
    call["t"] = as_strided_copy(call["t"], view)
    check(call, grad_view=grad_view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_keys_beside_values(dtype):
    """A view whose tokens are dense is read where it lies; here it must only be read right."""
    kv = torch.randn(2, 5, 2, 3, 8).to(dtype)
    call = operands(2, 5, 3, 8, dtype=dtype)
    for k in kv.unbind(2):
        assert_identical(
            moe_ops.rotary(**{**call, "t": k}), moe_ops.rotary(**{**call, "t": k.contiguous()})
        )


def test_back_undoes_forth():
    call = operands(2, 5, 3, 8, dtype=torch.float64)
    there = moe_ops.rotary(**call)
    back = moe_ops.rotary(**{**call, "t": there, "inverse": True})
    torch.testing.assert_close(back, call["t"])


def test_no_gradient_of_angles():
    call = {name: t.requires_grad_() for name, t in operands(1, 2, 4).items()}
    moe_ops.rotary(**call).sum().backward()
    assert call["t"].grad is not None
    assert call["cos"].grad is None and call["sin"].grad is None


@pytest.mark.parametrize("inverse", [False, True], ids=["forth", "back"])
def test_gradcheck(inverse):
    call = operands(2, 3, 2, 4, dtype=torch.float64, inverse=inverse)
    t = call.pop("t").requires_grad_()
    assert torch.autograd.gradcheck(lambda t: moe_ops.rotary(t, **call), t)
    assert torch.autograd.gradgradcheck(lambda t: moe_ops.rotary(t, **call), t)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 2, 6), (0, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck(requires_grad, shape):
    call = operands(*shape)
    call["t"].requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.rotary.default, (*call.values(), True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype):
    call = operands(2, 5, 3, 8, dtype=dtype)
    call["t"].requires_grad_()
    compiled = torch.compile(
        lambda call: moe_ops.rotary(**call), fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(call), moe_ops.rotary(**call)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(x, call["t"], grad)[0] for x in (got, want)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=short)
def test_autocast_keeps_the_dtype(dtype):
    call = operands(2, 5, 3, 8, dtype=dtype)
    want = moe_ops.rotary(**call)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert_identical(moe_ops.rotary(**call), want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    call = operands(2, 700, 6, 34, dtype=dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        runs.append(moe_ops.rotary(**call))
    for run in runs[1:]:
        assert_identical(run, runs[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"t": torch.zeros(3, 4)}, ["t", "[3, 4]"]),
        ({"t": torch.zeros(2, 3, 5)}, ["t", "[2, 3, 5]"]),
        ({"t": torch.zeros(2, 3, 4, dtype=torch.int64)}, ["t", "int64"]),
        ({"cos": torch.zeros(2)}, ["cos", "[2]"]),
        ({"cos": torch.zeros(4, 2)}, ["cos", "[4, 2]"]),
        ({"sin": torch.zeros(3, 4)}, ["sin", "[3, 4]"]),
        ({"sin": torch.zeros(2, 3, 2)}, ["sin", "[2, 3, 2]"]),
        ({"sin": torch.zeros(3, 2, dtype=torch.int32)}, ["sin", "int32"]),
        ({"cos": torch.zeros(1, 3, 2), "sin": torch.zeros(1, 3, 2)}, ["cos", "[1, 3, 2]"]),
    ],
    ids=str,
)
def test_bad_input(change, words, bad_input):
    call = {"t": torch.zeros(2, 3, 4), "cos": torch.ones(3, 2), "sin": torch.zeros(3, 2), **change}
    with bad_input("rotary", *words):
        moe_ops.rotary(**call)

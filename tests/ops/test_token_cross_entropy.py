from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import moe_ops
from moe_ops import reference
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    acc_dtype,
    as_strided_copy,
    assert_identical,
    eps,
    short,
)


def operands(tokens, vocab, dtype=torch.float32, ids=torch.int64):
    return {
        "logits": (4 * torch.randn(tokens, vocab)).to(dtype),
        "targets": torch.randint(vocab, (tokens,)).to(ids),
    }


def check(call):
    logits, targets = call["logits"], call["targets"]
    losses, grad = moe_ops.token_cross_entropy(**call)
    assert losses.dtype == acc_dtype(logits.dtype) and grad.dtype == logits.dtype
    assert grad.is_contiguous()
    wide = logits.detach().double().requires_grad_()
    want = F.cross_entropy(wide, targets.long(), reduction="none")
    (want_grad,) = torch.autograd.grad(want.sum(), wide)
    accumulated = eps(acc_dtype(logits.dtype))
    # A difference of two numbers below the largest logit, each rounded, and a sum of V.
    size = logits.detach().double().abs().amax(1, keepdim=True) + 4
    bound = 8 * accumulated * size[:, 0]
    assert bool(((losses - want).abs() <= bound).all())
    bound = 8 * accumulated * size + eps(logits.dtype) * want_grad.abs()
    assert bool(((grad - want_grad).abs() <= bound).all())


@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 17, 33, 64, 100, 256, 1003])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_values(dtype, vocab):
    check(operands(9, vocab, dtype))


def test_reference():
    call = operands(9, 33, torch.float64)
    call["targets"][3] = -100
    for got, want in zip(
        moe_ops.token_cross_entropy(**call), reference.token_cross_entropy(**call), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_ignored(dtype, ids):
    call = operands(11, 20, dtype, ids)
    call["targets"][::3] = -100
    call["logits"][6] = torch.nan
    losses, grad = moe_ops.token_cross_entropy(**call)
    assert not losses[::3].any() and not grad[::3].any()
    call["logits"], call["targets"] = call["logits"][1::3], call["targets"][1::3]
    check(call)
    assert_identical(moe_ops.token_cross_entropy(**call)[1], grad[1::3])


def test_large_and_infinite():
    """Exponentials of differences only: no overflow, and no log of zero."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [3e38, -3e38, 0.0], [0.0, -torch.inf, 0.0]])
    losses, grad = moe_ops.token_cross_entropy(logits, torch.tensor([1, 0, 2]))
    torch.testing.assert_close(losses, torch.tensor([1e4, 0.0, 2.0]).where(
        torch.tensor([True, True, False]), torch.tensor(2.0).log()))  # fmt: skip
    want = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, -0.5]])
    torch.testing.assert_close(grad, want)
    for bad in (torch.nan, torch.inf):
        for column in (0, 18):  # In a vector and in what is left of one.
            logits = torch.randn(2, 19)
            logits[0, column] = bad
            losses, grad = moe_ops.token_cross_entropy(logits, torch.tensor([3, 3]))
            assert losses[0].isnan() and grad[0].isnan().any()
            assert losses[1].isfinite() and grad[1].isfinite().all()


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_views(view):
    call = operands(9, 16)
    call["logits"] = as_strided_copy(call["logits"], view)
    got = moe_ops.token_cross_entropy(**call)
    call["logits"] = call["logits"].contiguous()
    for a, b in zip(got, moe_ops.token_cross_entropy(**call), strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (0, 0)], ids=str)
def test_nothing(shape):
    losses, grad = moe_ops.token_cross_entropy(
        torch.zeros(shape), torch.zeros(0, dtype=torch.int64)
    )
    assert losses.shape == (0,) and grad.shape == shape


@pytest.mark.cpu_only
def test_no_gradient():
    call = operands(3, 5)
    call["logits"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"token_cross_entropy: .* logits"):
        moe_ops.token_cross_entropy(**call)
    with torch.no_grad():
        moe_ops.token_cross_entropy(**call)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype):
    torch.library.opcheck(
        torch.ops.moe_ops.token_cross_entropy.default, tuple(operands(5, 7, dtype).values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype):
    call = operands(5, 20, dtype)
    compiled = torch.compile(moe_ops.token_cross_entropy, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(**call), moe_ops.token_cross_entropy(**call), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_autocast_keeps_the_dtype(dtype):
    call = operands(5, 20, dtype)
    want = moe_ops.token_cross_entropy(**call)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(moe_ops.token_cross_entropy(**call), want, strict=True):
            assert_identical(a, b)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    call = operands(700, 300, dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        runs.append(moe_ops.token_cross_entropy(**call))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(4)}, ["logits", "[4]"]),
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, ["logits", "int64"]),
        ({"targets": torch.zeros(4)}, ["targets", "float32"]),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ["targets", "[3]"]),
        ({"targets": torch.zeros(4, 1, dtype=torch.int64)}, ["targets", "[4, 1]"]),
    ],
    ids=str,
)
def test_bad_input(change, words, bad_input):
    call = {"logits": torch.zeros(4, 3), "targets": torch.zeros(4, dtype=torch.int32), **change}
    with bad_input("token_cross_entropy", *words):
        moe_ops.token_cross_entropy(**call)


@pytest.mark.cpu_only
@pytest.mark.parametrize("target", [3, -1, -101])
def test_target_out_of_range(target, bad_input):
    targets = torch.tensor([0, target, 2])
    with bad_input("token_cross_entropy", "targets", str(target)):
        moe_ops.token_cross_entropy(torch.zeros(3, 3), targets)

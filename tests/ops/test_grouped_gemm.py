"""grouped_gemm and its two companions, grouped_gemm_wgrad and grouped_sum.

The file is long because one file has the tests of an op and its companions (test_layout.py).
"""

from __future__ import annotations

import pytest
import torch
from tests.helpers.op_case import OpCase, ones
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS

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
    "grouped_gemm": OpCase(
        lambda s: {
            "a": s.float(s.n, s.h),
            "b": s.float(s.e, s.o, s.h),
            "expert_offsets": s.offsets(),
            "bias": s.float(s.e, s.o),
        },
        free_dims={"a": {0}},
        mixed_floats=(),
        twice=True,
        # Bytes modulo 2^64 look like a size that the buffer cache serves.
        too_many_bytes=lambda: moe_ops.grouped_gemm(
            torch.ones(2**20, 1), ones(1, 2**42 + 4, 1), torch.tensor([0, 2**20])
        ),
    ),
    "grouped_gemm_wgrad": OpCase(
        lambda s: {
            "grad": s.float(s.n, s.o),
            "a": s.float(s.n, s.h),
            "expert_offsets": s.offsets(),
        },
        free_dims={"grad": {1}, "a": {1}, "expert_offsets": {0}},
        mixed_floats=(),
        twice=True,
        too_many_bytes=lambda: moe_ops.grouped_gemm_wgrad(
            torch.empty(0, 2**31), torch.empty(0, 2**32), torch.tensor([0, 0])
        ),
    ),
    "grouped_sum": OpCase(
        lambda s: {"rows": s.float(s.n, s.o), "expert_offsets": s.offsets()},
        free_dims={"rows": {0, 1}, "expert_offsets": {0}},
        twice=True,
        too_many_bytes=lambda: moe_ops.grouped_sum(torch.empty(0, 2**62), torch.tensor([0, 0])),
    ),
}
# (K, O): around the tile sizes of every instruction set, and far from them.
SIZES = (
    (1, 1),
    (1, 17),
    (3, 7),
    (7, 3),
    (8, 16),
    (16, 6),
    (17, 33),
    (31, 1),
    (32, 32),
    (33, 31),
    (65, 97),
    (64, 48),
    (97, 65),
    (129, 15),
    (257, 129),
    (5, 257),
)
# Rows an expert gets: each remainder of a row tile, empty ones between.
ROW_COUNTS = (
    (0,),
    (1,),
    (5,),
    (0, 0, 3),
    (6, 0, 7),
    (1, 2, 3, 4, 5),
    (11, 12, 13),
    (31, 32, 33),
    (65, 0, 129),
    (8, 9, 10, 0),
    # More rows than one block of rows (96) and than one block of the sum in a wgrad (256).
    (97, 0, 300),
    (513,),
)
ALL_VIEWS = [*VIEWS, "step2_last"]


def offsets_of(counts, dtype=torch.int32):
    return torch.tensor([0, *counts]).cumsum(0).to(dtype)


def gemm_operands(counts, k, o, dtype, *, tail=0, bias=False):
    e, n = len(counts), sum(counts) + tail
    call = {
        "a": torch.randn(n, k).to(dtype),
        "b": torch.randn(e, o, k).to(dtype),
        "expert_offsets": offsets_of(counts),
    }
    if bias:
        call["bias"] = torch.randn(e, o).to(dtype)
    return call


def check_gemm(call, **kwargs):
    k, o, n = call["a"].shape[1], call["b"].shape[1], call["a"].shape[0]
    wrt = [name for name in ("a", "b", "bias") if name in call]
    check_against_reference(
        moe_ops.grouped_gemm,
        reference.grouped_gemm,
        call,
        wrt,
        sum_length=max(k, o, n, 1),
        **kwargs,
    )


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("k", "o"), SIZES)
def test_sizes(k, o, dtype, bias):
    check_gemm(gemm_operands((5, 0, 13, 1), k, o, dtype, tail=2, bias=bias))


@pytest.mark.parametrize("tail", [0, 3], ids=["full", "tail"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("counts", ROW_COUNTS, ids=str)
def test_row_counts(counts, dtype, tail):
    check_gemm(gemm_operands(counts, 19, 21, dtype, tail=tail, bias=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing, dtype):
    call = gemm_operands((0,) * routing.num_experts, 9, 12, dtype, tail=routing.num_slots)
    call["expert_offsets"] = routing.sorted()[0]
    check_gemm(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("k", "o"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sizes(k, o, dtype):
    check_gemm(gemm_operands((2, 0, 3), k, o, dtype, tail=1, bias=True))


@pytest.mark.parametrize("view", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("k", "o"), [(600, 270), (257, 520)])
def test_more_than_one_block_in_every_direction(k, o, dtype, view):
    call = gemm_operands((101, 2), k, o, dtype, tail=1, bias=True)
    call["b"] = as_strided_copy(call["b"], view)
    check_gemm(call)


@pytest.mark.slow_on_simulator
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("k", "o"), [(2070, 30), (4130, 9), (34, 1030)])
def test_few_rows_in_more_than_one_block(k, o, dtype):
    """Depths above 2048 elements or pairs, and more than 1024 features: experts of few rows, whose
    weights are read as they lie, are cut there."""
    check_gemm(gemm_operands((1, 3, 7, 0, 14, 33, 65), k, o, dtype, bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("k", "o"), [(19, 37), (320, 37), (37, 320)])
@pytest.mark.parametrize("dim", [1, 2], ids=["rows", "columns"])
def test_weights_that_are_expanded(dim, k, o, dtype):
    call = gemm_operands((1, 3, 6, 0, 10, 33), k, o, dtype)
    call["b"] = call["b"].narrow(dim, 0, 1).clone().expand_as(call["b"])
    check_gemm(call)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("o", range(1, 70, 3))
@pytest.mark.parametrize("k", range(1, 70, 4))
def test_sweep(k, o, dtype):
    check_gemm(gemm_operands((7, 1, 0, 18), k, o, dtype, tail=2))


@pytest.mark.parametrize("grad_view", ALL_VIEWS)
@pytest.mark.parametrize("view", ALL_VIEWS)
def test_views(view, grad_view):
    call = gemm_operands((5, 0, 9), 17, 23, torch.float32, tail=1, bias=True)
    for name in ("a", "b", "bias"):
        call[name] = as_strided_copy(call[name], view)
    check_gemm(call, grad_view=grad_view)


@pytest.mark.parametrize("view", ALL_VIEWS)
@pytest.mark.parametrize("name", ["a", "b", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_one_view_at_a_time(dtype, name, view):
    call = gemm_operands((5, 0, 9), 17, 23, dtype, bias=True)
    call[name] = as_strided_copy(call[name], view)
    check_gemm(call, grad_view=view)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_weights_kept_as_in_features_by_out_features(dtype):
    """b [E, O, K] as a view of [K, E, O]: no dimension where a dense kernel wants it."""
    call = gemm_operands((5, 4), 13, 18, dtype)
    call["b"] = torch.randn(13, 2, 18).to(dtype).permute(1, 2, 0)
    check_gemm(call)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=short)
@pytest.mark.parametrize("view", ["contiguous", "step2", "offset"])
def test_offsets_of_either_dtype(index_dtype, view):
    call = gemm_operands((5, 0, 9), 6, 7, torch.float32, tail=1)
    call["expert_offsets"] = as_strided_copy(call["expert_offsets"].to(index_dtype), view)
    check_gemm(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_stays_in_its_row(dtype):
    """Neither a tile's neighbors nor the zero tail see the NaN of a row or of an expert."""
    call = gemm_operands((7, 5, 6), 20, 24, dtype, tail=3)
    call["a"][8] = torch.nan
    call["a"][18:] = torch.nan
    call["b"][2, 11] = torch.nan
    out = moe_ops.grouped_gemm(**call)
    where = torch.zeros(21, 24, dtype=torch.bool)
    where[8] = True
    where[12:18, 11] = True
    assert_identical(out.isnan(), where)
    assert bool((out[18:] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_of_the_tail_stays_out_of_gradients(dtype):
    call = gemm_operands((7, 5), 20, 24, dtype, tail=3, bias=True)
    call["a"][12:] = torch.nan
    leaves = [call[name].requires_grad_() for name in ("a", "b", "bias")]
    out = moe_ops.grouped_gemm(**call)
    grad = torch.ones_like(out)
    grad[12:] = torch.nan
    grads = torch.autograd.grad(out, leaves, grad)
    assert not any(g.isnan().any() for g in grads)
    assert bool((grads[0][12:] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_empty_expert_has_zero_gradient(dtype):
    call = gemm_operands((4, 0, 3), 9, 11, dtype, bias=True)
    call["b"][1] = torch.nan
    leaves = [call["b"].requires_grad_(), call["bias"].requires_grad_()]
    grads = torch.autograd.grad(moe_ops.grouped_gemm(**call).sum(), leaves)
    assert all(bool((g[1] == 0).all()) for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_accumulates_in_fp32(dtype):
    """Ones that a half sum would drop: 4096 + 1 is 4096 in bf16 and fp16's step there is 4."""
    k = 1 + 512
    a = torch.ones(3, k, dtype=dtype)
    a[:, 0] = 4096
    b = torch.ones(1, 5, k, dtype=dtype)
    out = moe_ops.grouped_gemm(a, b, offsets_of((3,)))
    assert_identical(out, torch.full((3, 5), 4096.0 + 512).to(dtype))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_fp16_overflows_to_infinity(rows):
    a = torch.tensor([[300.0, 0], [-300.0, 0]], dtype=torch.float16).repeat(rows, 1)
    b = torch.full((1, 3, 2), 300.0, dtype=torch.float16)
    out = moe_ops.grouped_gemm(a, b, offsets_of((2 * rows,)))
    assert_identical(out, torch.tensor([[torch.inf], [-torch.inf]]).half().repeat(rows, 3))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_subnormals_are_numbers(dtype, rows):
    """2^-20 is subnormal in fp16, 2^-130 in fp32: neither is zero, going in or coming out."""
    small = 2.0**-20 if dtype == torch.float16 else 2.0**-130
    a = torch.full((rows, 3), small, dtype=dtype)
    b = torch.tensor([[[1.0, 0, 0], [0, 8, 8], [0.0, 0, 1024]]], dtype=dtype)
    out = moe_ops.grouped_gemm(a, b, offsets_of((rows,)))
    want = torch.tensor([small, 16 * small, 1024 * small], dtype=torch.float64)
    assert_identical(out, want.to(dtype).expand(rows, 3))


def test_weights_changed_between_forward_and_backward_are_noticed():
    call = gemm_operands((2, 3), 5, 7, torch.float32)
    a = call["a"].requires_grad_()
    out = moe_ops.grouped_gemm(**call)
    call["b"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), a)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("counts", [(2, 0, 3), (0,), (1,), (4, 1)], ids=str)
def test_gradcheck(counts, bias):
    call = gemm_operands(counts, 3, 4, torch.float64, tail=1, bias=bias)
    names = ["a", "b", "bias"][: 2 + bias]
    inputs = tuple(call[name].requires_grad_() for name in names)

    def fn(*tensors):
        return moe_ops.grouped_gemm(**{**call, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad, bias):
    call = gemm_operands((2, 0, 3), 5, 7, dtype, tail=1, bias=bias)
    for name in ("a", "b", "bias")[: 2 + bias]:
        call[name].requires_grad_(requires_grad)
    keyword = {"bias": call.pop("bias", None)}
    torch.library.opcheck(torch.ops.moe_ops.grouped_gemm.default, tuple(call.values()), keyword)


def test_gradient_of_a_plain_sum():
    """The gradient of a plain sum has stride 0 everywhere."""
    call = gemm_operands((2, 3), 5, 7, torch.float32)
    a = call["a"].requires_grad_()
    b = call["b"].requires_grad_()
    grads = torch.autograd.grad(moe_ops.grouped_gemm(**call).sum(), (a, b))
    want = torch.autograd.grad(reference.grouped_gemm(**call).sum(), (a, b))
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_compile(dtype, bias):
    call = gemm_operands((2, 0, 3), 5, 7, dtype, tail=1, bias=bias)
    leaves = [call[name].requires_grad_() for name in ("a", "b", "bias")[: 2 + bias]]
    compiled = torch.compile(moe_ops.grouped_gemm, fullgraph=True, backend="aot_eager")
    got, want = compiled(**call), moe_ops.grouped_gemm(**call)
    assert_identical(got, want)
    grad = torch.randn(want.shape).to(dtype)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(want, leaves, grad),
        strict=True,
    ):
        assert_identical(a, b, "gradient")


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_autocast_casts_like_a_linear(dtype, bias):
    call = gemm_operands((2, 0, 3), 5, 7, dtype, tail=1, bias=bias)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = moe_ops.grouped_gemm(**call)
    assert_identical(out, moe_ops.grouped_gemm(**half))


def test_autocast_gradients_keep_the_parameters_dtype():
    call = gemm_operands((2, 0, 3), 5, 7, torch.float32)
    leaves = [call["a"].requires_grad_(), call["b"].requires_grad_()]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = moe_ops.grouped_gemm(**call)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    call = gemm_operands((131, 0, 40, 3, 200), 96, 130, dtype, tail=5, bias=True)
    leaves = [call[name].requires_grad_() for name in ("a", "b", "bias")]
    grad = torch.randn(379, 130).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        out = moe_ops.grouped_gemm(**call)
        runs.append((out, *torch.autograd.grad(out, leaves, grad)))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_inference_and_training_agree(dtype):
    call = gemm_operands((5, 0, 13), 33, 31, dtype, bias=True)
    plain = moe_ops.grouped_gemm(**call)
    call["a"].requires_grad_()
    assert_identical(moe_ops.grouped_gemm(**call).detach(), plain)


# ------------------------------------------------------------------------------------------ wgrad


def wgrad_operands(counts, o, k, dtype, *, tail=0):
    n = sum(counts) + tail
    return {
        "grad": torch.randn(n, o).to(dtype),
        "a": torch.randn(n, k).to(dtype),
        "expert_offsets": offsets_of(counts),
    }


def check_wgrad(call, **kwargs):
    check_against_reference(
        moe_ops.grouped_gemm_wgrad,
        reference.grouped_gemm_wgrad,
        call,
        ["grad", "a"],
        sum_length=max(1, *call["grad"].shape, call["a"].shape[1]),
        **kwargs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("k", "o"), SIZES)
def test_wgrad_sizes(k, o, dtype):
    check_wgrad(wgrad_operands((5, 0, 13, 1), o, k, dtype, tail=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("counts", ROW_COUNTS, ids=str)
def test_wgrad_row_counts(counts, dtype):
    check_wgrad(wgrad_operands(counts, 19, 21, dtype, tail=3))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("in_features", [1056, 1090])
def test_wgrad_from_8_mib_on(in_features, dtype):
    """Written past the cache where rows are whole lines; of few rows, and of more than a block."""
    check_wgrad(wgrad_operands((3, 0, 40, 401), 1030, in_features, dtype, tail=1))


@pytest.mark.parametrize("grad_view", ["contiguous", "transposed", "offset", "expanded"])
@pytest.mark.parametrize("view", ALL_VIEWS)
def test_wgrad_views(view, grad_view):
    call = wgrad_operands((5, 0, 9), 17, 23, torch.float32, tail=1)
    for name in ("grad", "a"):
        call[name] = as_strided_copy(call[name], view)
    check_wgrad(call, grad_view=grad_view)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_wgrad_ignores_nan_of_the_tail(dtype):
    call = wgrad_operands((5, 0, 9), 17, 23, dtype, tail=2)
    call["grad"][14:] = torch.nan
    call["a"][14:] = torch.nan
    assert not moe_ops.grouped_gemm_wgrad(**call).isnan().any()


@pytest.mark.parametrize("counts", [(2, 0, 3), (0,), (4, 1)], ids=str)
def test_wgrad_gradcheck(counts):
    call = wgrad_operands(counts, 3, 4, torch.float64, tail=1)
    inputs = (call["grad"].requires_grad_(), call["a"].requires_grad_())

    def fn(grad, a):
        return moe_ops.grouped_gemm_wgrad(grad, a, call["expert_offsets"])

    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_wgrad_opcheck(dtype, requires_grad):
    call = wgrad_operands((2, 0, 3), 5, 7, dtype, tail=1)
    call["grad"].requires_grad_(requires_grad)
    call["a"].requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.grouped_gemm_wgrad.default, tuple(call.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_wgrad_same_bits_for_any_thread_count(dtype, set_threads):
    call = wgrad_operands((131, 0, 40, 3, 200), 96, 130, dtype, tail=5)
    set_threads(1)
    one = moe_ops.grouped_gemm_wgrad(**call)
    set_threads(2)
    assert_identical(moe_ops.grouped_gemm_wgrad(**call), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_wgrad_compile(dtype):
    call = wgrad_operands((2, 0, 3), 5, 7, dtype, tail=1)
    compiled = torch.compile(moe_ops.grouped_gemm_wgrad, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(**call), moe_ops.grouped_gemm_wgrad(**call))


# -------------------------------------------------------------------------------------------- sum


def check_sum(call, **kwargs):
    check_against_reference(
        moe_ops.grouped_sum,
        reference.grouped_sum,
        call,
        ["rows"],
        sum_length=max(1, call["rows"].shape[0]),
        **kwargs,
    )


def sum_operands(counts, o, dtype, *, tail=0):
    return {
        "rows": torch.randn(sum(counts) + tail, o).to(dtype),
        "expert_offsets": offsets_of(counts),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("o", [0, 1, 3, 7, 8, 17, 31, 33, 65, 129, 257])
def test_sum_sizes(o, dtype):
    check_sum(sum_operands((5, 0, 13, 1), o, dtype, tail=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("counts", ROW_COUNTS, ids=str)
def test_sum_row_counts(counts, dtype):
    check_sum(sum_operands(counts, 19, dtype, tail=3))


@pytest.mark.parametrize("grad_view", ["contiguous", "transposed", "offset", "expanded"])
@pytest.mark.parametrize("view", ALL_VIEWS)
def test_sum_views(view, grad_view):
    call = sum_operands((5, 0, 9), 17, torch.float32, tail=1)
    call["rows"] = as_strided_copy(call["rows"], view)
    check_sum(call, grad_view=grad_view)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sum_ignores_nan_of_the_tail(dtype):
    call = sum_operands((5, 0, 9), 17, dtype, tail=2)
    call["rows"][14:] = torch.nan
    assert not moe_ops.grouped_sum(**call).isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_sum_accumulates_in_fp32(dtype):
    rows = torch.ones(513, 3, dtype=dtype)
    rows[0] = 4096
    out = moe_ops.grouped_sum(rows, offsets_of((513,)))
    assert_identical(out, torch.full((1, 3), 4096.0 + 512).to(dtype))


@pytest.mark.parametrize("counts", [(2, 0, 3), (0,), (4, 1)], ids=str)
def test_sum_gradcheck(counts):
    call = sum_operands(counts, 3, torch.float64, tail=1)
    rows = call["rows"].requires_grad_()

    def fn(rows):
        return moe_ops.grouped_sum(rows, call["expert_offsets"])

    assert torch.autograd.gradcheck(fn, rows)
    assert torch.autograd.gradgradcheck(fn, rows)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_sum_opcheck(dtype, requires_grad):
    call = sum_operands((2, 0, 3), 5, dtype, tail=1)
    call["rows"].requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.grouped_sum.default, tuple(call.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sum_same_bits_for_any_thread_count(dtype, set_threads):
    call = sum_operands((1310, 0, 400, 3), 130, dtype, tail=5)
    set_threads(1)
    one = moe_ops.grouped_sum(**call)
    set_threads(2)
    assert_identical(moe_ops.grouped_sum(**call), one)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": torch.zeros(12)}, ["a", "[12]"]),
        ({"a": torch.zeros(12, 6)}, ["a", "6"]),
        ({"a": torch.zeros(12, 5, dtype=torch.int64)}, ["a", "int64"]),
        ({"b": torch.zeros(3, 7)}, ["b", "[3, 7]"]),
        ({"b": torch.zeros(4, 7, 5)}, ["b", "4"]),
        ({"b": torch.zeros(3, 7, 6)}, ["b", "6"]),
        ({"b": torch.zeros(3, 7, 5, dtype=torch.bfloat16)}, ["b", "bfloat16"]),
        ({"bias": torch.zeros(3, 8)}, ["bias", "[3, 8]"]),
        ({"bias": torch.zeros(7)}, ["bias", "[7]"]),
        ({"bias": torch.zeros(3, 7, dtype=torch.float64)}, ["bias", "float64"]),
        ({"expert_offsets": torch.zeros(4)}, ["expert_offsets", "float32"]),
        ({"expert_offsets": torch.zeros(4, 1, dtype=torch.int32)}, ["expert_offsets", "[4, 1]"]),
        ({"expert_offsets": torch.zeros(0, dtype=torch.int32)}, ["expert_offsets"]),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else "",
)
def test_bad_input(change, words, bad_input):
    call = gemm_operands((4, 3, 5), 5, 7, torch.float32, bias=True)
    # A wrong pair may be blamed on either of its two tensors.
    name = "" if words[0] in ("a", "b") or words[-1] == "4" else words[0]
    with bad_input("grouped_gemm", name):
        moe_ops.grouped_gemm(**{**call, **change})


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "offsets", [[0, 4, 7, 13], [0, 8, 7, 12], [1, 4, 7, 12], [0, -4, 7, 12], [0, 4, 7, 2**31 - 1]]
)
@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_gemm_wgrad", "grouped_sum"])
def test_offsets_out_of_order(op, offsets, bad_input):
    """Offsets that would lead outside the rows are refused, not followed."""
    call = {
        "grouped_gemm": gemm_operands((4, 3, 5), 5, 7, torch.float32),
        "grouped_gemm_wgrad": wgrad_operands((4, 3, 5), 5, 7, torch.float32),
        "grouped_sum": sum_operands((4, 3, 5), 5, torch.float32),
    }[op]
    call["expert_offsets"] = torch.tensor(offsets, dtype=torch.int32)
    with bad_input(op, "expert_offsets"):
        getattr(moe_ops, op)(**call)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"grad": torch.zeros(11, 5)}, ""),
        ({"grad": torch.zeros(12)}, "grad"),
        ({"a": torch.zeros(12, 7, dtype=torch.bfloat16)}, "a"),
        ({"a": torch.zeros(12, 7, 1)}, "a"),
        ({"grad": torch.zeros(12, 5, dtype=torch.int32)}, "grad"),
    ],
    ids=["rows", "grad-1d", "a-dtype", "a-3d", "grad-int"],
)
def test_wgrad_bad_input(change, name, bad_input):
    call = wgrad_operands((4, 3, 5), 5, 7, torch.float32)
    with bad_input("grouped_gemm_wgrad", name):
        moe_ops.grouped_gemm_wgrad(**{**call, **change})


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(12), torch.zeros(12, 5, 1), torch.zeros(12, 5, dtype=torch.int32)],
    ids=["1d", "3d", "int"],
)
def test_sum_bad_input(rows, bad_input):
    with bad_input("grouped_sum", "rows"):
        moe_ops.grouped_sum(rows, offsets_of((4, 3, 5)))

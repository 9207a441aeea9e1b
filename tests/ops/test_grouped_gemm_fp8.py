"""grouped_gemm_fp8 and grouped_gemm_fp8_wgrad against their fp64 references on the same codes: what
is left is fp32 rounding.

What rounding operands to e4m3 costs is tested by itself, with a bound made of codes' steps. This
file is long because the two ops share their cases.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.helpers.fp8 import check_grouped_gemm_fp8 as check
from tests.helpers.fp8 import (
    check_grouped_gemm_fp8_wgrad,
    fp8_gemm_operands,
    fp8_wgrad_operands,
)
from tests.helpers.op_case import OpCase
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS

import moe_ops
from moe_ops import reference
from moe_ops.quant import quantize_fp8_blocks
from moe_ops.testing import as_strided_copy, assert_identical, eps, short


def two_blocks(s):
    """Two blocks of 128 in every direction that has scales."""
    k, o = 128 + s.h, 128 + s.o
    return {
        "a": torch.randn(s.n, k).to(torch.float8_e4m3fn),
        "a_scale": torch.rand(s.n, 2),
        "b": torch.randn(s.e, o, k).to(torch.float8_e4m3fn),
        "b_scale": torch.rand(s.e, 2, 2),
        "expert_offsets": s.offsets(),
        "bias": s.narrow(s.e, o),
    }


def two_groups(s):
    """An expert with more than one group."""
    offsets = s.offsets()
    offsets[-1] += 150
    groups = int(offsets[-1]) // 128 + s.e
    return {
        "grad": torch.randn(s.o, 128 * groups).to(torch.float8_e4m3fn),
        "grad_scale": torch.rand(groups, s.o),
        "a": torch.randn(s.h, 128 * groups).to(torch.float8_e4m3fn),
        "a_scale": torch.rand(groups, s.h),
        "expert_offsets": offsets,
    }


def empty_fp8(*shape):
    return torch.empty(*shape).to(torch.float8_e4m3fn)


OP_CASES = {
    "grouped_gemm_fp8": OpCase(
        two_blocks,
        bad_arguments={"out_dtype": (torch.float64, torch.int32, torch.float8_e4m3fn)},
        mixed_floats=("bias",),
        kind="quantized",
        too_many_bytes=lambda: moe_ops.grouped_gemm_fp8(
            empty_fp8(2**31, 0),
            torch.ones(2**31, 0),
            empty_fp8(1, 2**32, 0),
            torch.ones(1, 2**25, 0),
            torch.tensor([0, 0]),
        ),
    ),
    "grouped_gemm_fp8_wgrad": OpCase(
        two_groups,
        free_dims={"expert_offsets": {0}},
        bad_arguments={"out_dtype": (torch.float64, torch.int32, torch.float8_e4m3fn)},
        kind="quantized",
    ),
}
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
out_dtypes = pytest.mark.parametrize("dtype", OUT_DTYPES, ids=short)
# (K, O): around vectors, tiles and blocks of 128, and far from them.
SIZES = (
    (1, 1),
    (3, 7),
    (7, 130),
    (16, 16),
    (31, 1),
    (33, 31),
    (64, 48),
    (127, 129),
    (128, 128),
    (129, 127),
    (130, 65),
    (200, 257),
    (256, 64),
    (257, 256),
    (384, 17),
    (500, 300),
)
# Few rows, every remainder of a tile, empty experts.
ROW_COUNTS = (
    (0,),
    (1,),
    (2, 0, 3, 4),
    (5, 0, 6),
    (0, 0, 7),
    (8, 9, 15, 16, 17),
    (31, 32, 33),
    (64, 0, 65),
    (127, 128, 129),
    (0, 300, 1),
)


@pytest.mark.parametrize("bias", [None, torch.float32], ids=["plain", "bias"])
@pytest.mark.parametrize(("k", "o"), SIZES)
def test_sizes(k, o, bias):
    check(fp8_gemm_operands((5, 0, 20, 1), k, o, tail=2, bias=bias))


@pytest.mark.parametrize("tail", [0, 3], ids=["full", "tail"])
@pytest.mark.parametrize("counts", ROW_COUNTS, ids=str)
def test_row_counts(counts, tail):
    check(fp8_gemm_operands(counts, 150, 140, tail=tail, bias=torch.float32))


@pytest.mark.parametrize("bias", OUT_DTYPES, ids=short)
@out_dtypes
def test_types(dtype, bias):
    call = fp8_gemm_operands((3, 0, 30), 200, 150, tail=1, bias=bias)
    call["a_scale"] *= 1e-2  # Away from the largest float16.
    check(call, dtype)


@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing):
    call = fp8_gemm_operands((0,) * routing.num_experts, 140, 24, tail=routing.num_slots)
    call["expert_offsets"] = routing.sorted()[0]
    check(call)


@pytest.mark.parametrize(("k", "o"), [(0, 5), (5, 0), (0, 0)])
@out_dtypes
def test_empty_sizes(k, o, dtype):
    check(fp8_gemm_operands((2, 0, 3), k, o, tail=1, bias=torch.float32), dtype)


@pytest.mark.parametrize(("k", "o"), [(1300, 520), (2100, 130)])
def test_more_than_one_block_in_every_direction(k, o):
    check(fp8_gemm_operands((3, 131, 20), k, o, tail=1, bias=torch.float32))


@pytest.mark.full
@pytest.mark.parametrize("o", range(1, 280, 23))
@pytest.mark.parametrize("k", range(1, 280, 19))
def test_sweep(k, o):
    check(fp8_gemm_operands((7, 1, 0, 18), k, o, tail=2))


@pytest.mark.parametrize("view", ["transposed", "offset", "step2", "step2_last"])
@pytest.mark.parametrize("name", ["a", "a_scale", "b", "b_scale", "bias"])
@pytest.mark.parametrize("k", [256, 300])
def test_views(k, name, view, backend):
    call = fp8_gemm_operands((5, 0, 30), k, 144, tail=1, bias=torch.float32)
    want = check(call)
    call[name] = as_strided_copy(call[name], view)
    got = check(call)
    # On CUDA, codes that start on 16 bytes have kernels of their own, which sum in another order.
    if backend == "cpu" or view != "offset" or name not in ("a", "b"):
        assert_identical(got, want)


def test_expanded():
    call = fp8_gemm_operands((2, 30), 200, 130, bias=torch.float32)
    for name in ("a", "a_scale", "b", "b_scale", "bias"):
        call[name] = as_strided_copy(call[name], "expanded")
    check(call)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=short)
@pytest.mark.parametrize("view", ["contiguous", "step2", "offset"])
def test_offsets_of_either_dtype(index_dtype, view):
    call = fp8_gemm_operands((5, 0, 9), 130, 17, tail=1)
    call["expert_offsets"] = as_strided_copy(call["expert_offsets"].to(index_dtype), view)
    check(call)


# --- the arithmetic


@pytest.mark.parametrize("rows", [2, 40])
def test_every_product_of_two_codes(rows):
    """All 254 numbers times all 254, each by itself: exact."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    a = torch.zeros(rows * 254, 128, dtype=torch.uint8)
    a[:, 5] = codes.repeat_interleave(rows)
    b = torch.zeros(1, 254, 128, dtype=torch.uint8)
    b[0, :, 5] = codes
    call = {
        "a": a.view(torch.float8_e4m3fn),
        "a_scale": torch.ones(len(a), 1),
        "b": b.view(torch.float8_e4m3fn),
        "b_scale": torch.ones(1, 2, 1),
        # `rows` rows at a time, as an expert has them.
        "expert_offsets": torch.tensor([0, len(a)]),
    }
    values = codes.view(torch.float8_e4m3fn).float()
    want = values.repeat_interleave(rows)[:, None] * values
    got = moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32)
    assert_identical(got + 0.0, want + 0.0)  # Zeros may lose their signs in sums.
    for part in range(0, len(a), rows * 64):  # The same for few rows.
        few = {**call, "a": call["a"][part : part + 2], "a_scale": call["a_scale"][:2]}
        few["expert_offsets"] = torch.tensor([0, 2])
        got = moe_ops.grouped_gemm_fp8(**few, out_dtype=torch.float32)
        assert_identical(got + 0.0, want[part : part + 2] + 0.0)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 40])
def test_each_scale_meets_its_own_block(rows):
    """Codes of one, scales that are distinct powers of two: sums of them are exact."""
    k, o = 300, 260
    call = {
        "a": torch.ones(2 * rows, k).to(torch.float8_e4m3fn),
        "a_scale": 2.0 ** torch.randint(-4, 4, (2 * rows, 3)),
        "b": torch.ones(2, o, k).to(torch.float8_e4m3fn),
        "b_scale": 2.0 ** torch.randint(-4, 4, (2, 3, 3)),
        "expert_offsets": torch.tensor([0, rows, 2 * rows]),
    }
    got = moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32)
    size = torch.tensor([128.0, 128.0, 44.0])
    want = torch.einsum("eri,eoi,i->ero", call["a_scale"].view(2, rows, 3), call["b_scale"], size)
    want = want.repeat_interleave(128, 2)[:, :, :o].reshape(2 * rows, o)
    assert_identical(got, want)


@pytest.mark.parametrize("rows", [1, 40])
def test_extreme_scales(rows):
    """Each factor lies near the end of the range; their product does not."""
    call = fp8_gemm_operands((rows,), 256, 140)
    want = moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32)
    for power in (2.0**100, 2.0**-100):
        scaled = {**call, "a_scale": call["a_scale"] * power, "b_scale": call["b_scale"] / power}
        assert_identical(moe_ops.grouped_gemm_fp8(**scaled, out_dtype=torch.float32), want)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_largest_codes_do_not_overflow_inside(rows):
    """1024 products of 448 * 448, scaled into the range of the result only at the end."""
    k = 1024
    call = {
        "a": torch.full((rows, k), 448.0).to(torch.float8_e4m3fn),
        "a_scale": torch.full((rows, 8), 2.0**-20),
        "b": torch.full((1, 130, k), -448.0).to(torch.float8_e4m3fn),
        "b_scale": torch.full((1, 2, 8), 2.0**-8),
        "expert_offsets": torch.tensor([0, rows]),
    }
    got = moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32)
    assert_identical(got, torch.full((rows, 130), -(448.0**2) * k * 2.0**-28))


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_nan_stays_where_it_belongs(rows):
    """A code NaN in a or b, or a scale NaN, spoils its row, feature or block, and no other."""
    call = fp8_gemm_operands((rows, rows), 300, 260, tail=3)
    clean = moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32)
    call["a"][0, 130] = torch.nan
    call["a_scale"][rows, 2] = torch.nan
    call["b"][0, 200, 290] = torch.nan
    call["b_scale"][1, 2, 0] = torch.nan
    call["a"][2 * rows :] = torch.nan  # rows without an expert
    call["a_scale"][2 * rows :] = torch.nan
    out = moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32)
    where = torch.zeros(2 * rows + 3, 260, dtype=torch.bool)
    where[[0, rows]] = True
    where[:rows, 200] = True
    where[rows : 2 * rows, 256:] = True
    assert_identical(out.isnan(), where)
    assert_identical(out[~where], clean[~where])
    assert bool((out[2 * rows :] == 0).all())


def test_experts_without_rows_are_not_read():
    call = fp8_gemm_operands((4, 0, 30), 200, 150, bias=torch.float32)
    want = moe_ops.grouped_gemm_fp8(**call)
    for name in ("b", "b_scale", "bias"):
        call[name][1] = torch.nan
    assert_identical(moe_ops.grouped_gemm_fp8(**call), want)


@pytest.mark.parametrize("counts", [(3, 2), (70, 33)], ids=str)
def test_error_of_rounded_operands(counts):
    """Against the product of the numbers before rounding: at most the steps of both operands, and
    as errors have any sign, about 4 % of the norm."""
    n, k, o = sum(counts), 700, 200
    a, b = torch.randn(n, k), torch.randn(2, o, k)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    q, a_scale = moe_ops.quantize_fp8(a)
    w, b_scale = quantize_fp8_blocks(b)
    out = moe_ops.grouped_gemm_fp8(q, a_scale, w, b_scale, offsets, out_dtype=torch.float32)
    a, b = a.double(), b.double()

    def step(x, scale, rows):
        scale = scale.double().repeat_interleave(128, -1)[..., :k]
        if rows > 1:
            scale = scale.repeat_interleave(rows, -2)[..., :o, :]
        return torch.maximum(x.abs() / 16, scale / 1024) * (1 + 1e-6)

    da, db = step(a, a_scale, 1), step(b, b_scale, 128)
    expected = reference.grouped_gemm(a, b, offsets)
    bound = reference.grouped_gemm(da, b.abs() + db, offsets)
    bound += reference.grouped_gemm(a.abs(), db, offsets)
    assert bool(((out.double() - expected).abs() <= bound).all())
    assert (out.double() - expected).norm() <= 0.04 * expected.norm()


@pytest.mark.cpu_only
@pytest.mark.parametrize("counts", [(3, 0, 4), (131, 0, 40, 3, 200)], ids=str)
@out_dtypes
def test_same_bits_for_any_thread_count(dtype, counts, set_threads):
    call = fp8_gemm_operands(counts, 1500, 400, tail=5, bias=torch.float32)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        runs.append(moe_ops.grouped_gemm_fp8(**call, out_dtype=dtype))
    for run in runs[1:]:
        assert_identical(run, runs[0])


# --- torch


@pytest.mark.parametrize("bias", [None, torch.float32], ids=["plain", "bias"])
@out_dtypes
def test_opcheck(dtype, bias):
    call = fp8_gemm_operands((2, 0, 3), 130, 20, tail=1, bias=bias)
    bias = call.pop("bias", None)
    # test_schema compares arguments before and after by arithmetic that torch does not have for
    # float8 tensors.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.moe_ops.grouped_gemm_fp8.default, (*call.values(), dtype, bias), test_utils=tests
    )


def test_arguments_are_left_alone():
    call = fp8_gemm_operands((2, 0, 3), 130, 20, tail=1, bias=torch.float32)
    before = {name: t.clone() for name, t in call.items()}
    moe_ops.grouped_gemm_fp8(**call)
    for name, t in call.items():
        assert_identical(t.float(), before[name].float(), name)


@pytest.mark.parametrize("name", ["a_scale", "b_scale", "bias"])
def test_no_gradient(name):
    call = fp8_gemm_operands((2, 0, 3), 130, 20, bias=torch.float32)
    want = moe_ops.grouped_gemm_fp8(**call)
    call[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"grouped_gemm_fp8: .*{name} requires one"):
        moe_ops.grouped_gemm_fp8(**call)
    with torch.no_grad():
        assert_identical(moe_ops.grouped_gemm_fp8(**call), want)


def test_compile():
    call = fp8_gemm_operands((2, 0, 3), 130, 20, tail=1, bias=torch.bfloat16)
    compiled = torch.compile(moe_ops.grouped_gemm_fp8, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(**call), moe_ops.grouped_gemm_fp8(**call))


def test_autocast_changes_nothing():
    call = fp8_gemm_operands((2, 0, 3), 130, 20, bias=torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32)
    assert_identical(out, moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32))


def test_inference_mode():
    call = fp8_gemm_operands((2, 0, 30), 130, 20)
    want = moe_ops.grouped_gemm_fp8(**call)
    with torch.inference_mode():
        assert_identical(moe_ops.grouped_gemm_fp8(**call), want)


# --- bad input

F8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"a": torch.zeros(5, 130)}, "a", "float32"),
        ({"a": torch.zeros(5).to(F8)}, "a", "[5]"),
        ({"a": torch.zeros(5, 130).to(torch.float8_e5m2)}, "a", "float8_e5m2"),
        ({"a_scale": torch.zeros(5, 1)}, "a_scale", "[5, 1]"),
        ({"a_scale": torch.zeros(4, 2)}, "a_scale", "[4, 2]"),
        ({"a_scale": torch.zeros(5, 2).half()}, "a_scale", "float16"),
        ({"a_scale": torch.zeros(5)}, "a_scale", "[5]"),
        ({"b": torch.zeros(3, 20, 129).to(F8)}, "b", "[3, 20, 129]"),
        ({"b": torch.zeros(3, 20, 130).bfloat16()}, "b", "bfloat16"),
        ({"b": torch.zeros(20, 130).to(F8)}, "b", "[20, 130]"),
        ({"b_scale": torch.zeros(3, 1, 1)}, "b_scale", "[3, 1, 1]"),
        ({"b_scale": torch.zeros(3, 2, 2)}, "b_scale", "[3, 2, 2]"),
        ({"b_scale": torch.zeros(2, 1, 2)}, "b_scale", "[2, 1, 2]"),
        ({"b_scale": torch.zeros(3, 2)}, "b_scale", "[3, 2]"),
        ({"b_scale": torch.zeros(3, 1, 2).double()}, "b_scale", "float64"),
        ({"bias": torch.zeros(3, 21)}, "bias", "[3, 21]"),
        ({"bias": torch.zeros(3, 20).double()}, "bias", "float64"),
        ({"expert_offsets": torch.zeros(3).int()}, "expert_offsets", "[3]"),
        ({"expert_offsets": torch.zeros(4)}, "expert_offsets", "float32"),
        ({"out_dtype": torch.float64}, "out_dtype", "float64"),
        ({"out_dtype": torch.int8}, "out_dtype", "int8"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input(change, name, got, device, bad_input):
    call = {**fp8_gemm_operands((2, 0, 3), 130, 20), **change}
    if device == "meta":
        call = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with bad_input("grouped_gemm_fp8", name, got):
        moe_ops.grouped_gemm_fp8(**call)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("offsets", "got"), [((0, 3, 2, 5), "3 then 2"), ((0, 2, 2, 6), "6"), ((1, 2, 2, 5), "1")]
)
def test_bad_offsets(offsets, got, bad_input):
    call = fp8_gemm_operands((2, 0, 3), 130, 20)
    call["expert_offsets"] = torch.tensor(offsets)
    with bad_input("grouped_gemm_fp8", "expert_offsets", got):
        moe_ops.grouped_gemm_fp8(**call)


def test_sums_of_a_long_row_keep_their_accuracy():
    """The error does not grow with the number of blocks beyond what fp32 sums cost."""
    call = fp8_gemm_operands((3, 20), 16384, 20)
    out = check(call)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    expected = reference.grouped_gemm_fp8(**wide, out_dtype=torch.float64)
    assert (out - expected).norm() <= 16 * eps(torch.float32) * expected.norm()


# --- the gradient of the input


def transposed(call):
    """Returns the same product from weights that lie as those of a layer do, of whose input this is
    the gradient."""
    call = dict(call)
    call["b"] = call["b"].transpose(1, 2).contiguous().transpose(1, 2)
    call["b_scale"] = call["b_scale"].transpose(1, 2).contiguous().transpose(1, 2)
    return call


@pytest.mark.parametrize(("k", "o"), [(1, 1), (9, 130), (128, 64), (257, 200), (1300, 520)])
@pytest.mark.parametrize("counts", [(1, 2, 0, 5), (0, 40), (131, 0, 1)], ids=str)
def test_weights_dense_along_features(counts, k, o):
    call = transposed(fp8_gemm_operands(counts, k, o, tail=1, bias=torch.float32))
    check(call)


def test_weights_dense_along_features_in_the_batch_invariant_mode():
    call = fp8_gemm_operands((1, 0, 40), 300, 200)
    with moe_ops.batch_invariant():
        want = moe_ops.grouped_gemm_fp8(**call)
        assert_identical(moe_ops.grouped_gemm_fp8(**transposed(call)), want)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_nan_in_weights_dense_along_features(rows):
    call = fp8_gemm_operands((rows, rows), 300, 260)
    clean = moe_ops.grouped_gemm_fp8(**transposed(call), out_dtype=torch.float32)
    call["b"][0, 200, 290] = torch.nan
    call["b_scale"][1, 2, 0] = torch.nan
    out = moe_ops.grouped_gemm_fp8(**transposed(call), out_dtype=torch.float32)
    where = torch.zeros(2 * rows, 260, dtype=torch.bool)
    where[:rows, 200] = True
    where[rows:, 256:] = True
    assert_identical(out.isnan(), where)
    assert_identical(out[~where], clean[~where])


# --- the weight gradient

# (O, K): around vectors, tiles and blocks, and far from them.
WGRAD_SIZES = (
    (1, 1),
    (7, 3),
    (130, 7),
    (16, 16),
    (31, 33),
    (129, 127),
    (128, 128),
    (65, 130),
    (257, 200),
    (17, 384),
    (300, 500),
)
WGRAD_COUNTS = ((0,), (1,), (2, 0, 3), (0, 0, 7), (127, 128, 129), (0, 300, 1), (256, 0, 384))


@pytest.mark.parametrize(("o", "k"), WGRAD_SIZES)
def test_wgrad_sizes(o, k):
    check_grouped_gemm_fp8_wgrad(fp8_wgrad_operands((5, 0, 150, 1), o, k, tail=2))


@pytest.mark.parametrize("tail", [0, 3], ids=["full", "tail"])
@pytest.mark.parametrize("counts", WGRAD_COUNTS, ids=str)
def test_wgrad_row_counts(counts, tail):
    check_grouped_gemm_fp8_wgrad(fp8_wgrad_operands(counts, 70, 140, tail=tail))


@out_dtypes
def test_wgrad_types(dtype):
    call = fp8_wgrad_operands((3, 0, 200), 200, 150, tail=1)
    call["a_scale"] *= 1e-3  # Away from the largest float16.
    check_grouped_gemm_fp8_wgrad(call, dtype)


@pytest.mark.parametrize(("o", "k"), [(0, 5), (5, 0), (0, 0)])
def test_wgrad_empty_sizes(o, k):
    check_grouped_gemm_fp8_wgrad(fp8_wgrad_operands((2, 0, 3), o, k))


@pytest.mark.full
@pytest.mark.parametrize("k", range(1, 280, 23))
@pytest.mark.parametrize("o", range(1, 280, 19))
def test_wgrad_sweep(o, k):
    check_grouped_gemm_fp8_wgrad(fp8_wgrad_operands((7, 0, 140), o, k))


@pytest.mark.parametrize("view", ["transposed", "offset", "step2", "step2_last"])
@pytest.mark.parametrize("name", ["grad", "grad_scale", "a", "a_scale"])
def test_wgrad_views(name, view, backend):
    call = fp8_wgrad_operands((5, 0, 150), 144, 72, tail=1)
    want = check_grouped_gemm_fp8_wgrad(call)
    call[name] = as_strided_copy(call[name], view)
    got = check_grouped_gemm_fp8_wgrad(call)
    # On CUDA, what starts on 16 bytes has a kernel of its own, which sums in another order.
    if backend == "cpu" or view not in ("offset", "step2"):
        assert_identical(got, want)


@out_dtypes
def test_wgrad_main_grad(dtype):
    """Added in fp32, rounded once; experts without rows are not touched."""
    call = fp8_wgrad_operands((5, 0, 150), 70, 72)
    call["a_scale"] *= 1e-3
    main = torch.randn(3, 70, 72).to(dtype)
    want = moe_ops.grouped_gemm_fp8_wgrad(**call) + main.float()
    want = torch.where(torch.tensor([True, False, True])[:, None, None], want.to(dtype), main)
    got = main.clone()
    out = moe_ops.grouped_gemm_fp8_wgrad(**call, main_grad=got)
    assert out is got
    assert_identical(got, want)


def test_wgrad_each_scale_meets_its_own_group():
    """Codes of one, scales that are distinct powers of two: sums of them are exact."""
    counts, o, k = (128, 0, 300), 140, 72
    offsets = torch.tensor([0, *counts]).cumsum(0)
    groups = int(offsets[-1]) // 128 + 3
    ones = torch.zeros(1, 128 * groups)
    for e, count in enumerate(counts):
        first = 128 * (int(offsets[e]) // 128 + e)
        ones[:, first : first + count] = 1
    call = {
        "grad": ones.expand(o, -1).to(torch.float8_e4m3fn),
        "grad_scale": 2.0 ** torch.randint(-4, 4, (groups, o)),
        "a": ones.expand(k, -1).to(torch.float8_e4m3fn),
        "a_scale": 2.0 ** torch.randint(-4, 4, (groups, k)),
        "expert_offsets": offsets,
    }
    size = ones[0].view(groups, 128).sum(1)
    parts = torch.einsum("go,gk,g->gok", call["grad_scale"], call["a_scale"], size)
    want = torch.zeros(3, o, k)
    want[0], want[2] = parts[0], parts[3:6].sum(0)
    assert_identical(moe_ops.grouped_gemm_fp8_wgrad(**call), want)


def test_wgrad_nan_stays_where_it_belongs():
    """A code or a scale NaN spoils its feature of its expert, and no other."""
    call = fp8_wgrad_operands((130, 140), 140, 72, tail=3)
    clean = moe_ops.grouped_gemm_fp8_wgrad(**call)
    call["grad"][3, 129] = torch.nan  # the second group of expert 0
    call["grad_scale"][2, 130] = torch.nan  # the first of expert 1
    call["a"][70, 0] = torch.nan
    call["a_scale"][3, 5] = torch.nan
    out = moe_ops.grouped_gemm_fp8_wgrad(**call)
    where = torch.zeros(2, 140, 72, dtype=torch.bool)
    where[0, 3] = where[1, 130] = True
    where[0, :, 70] = where[1, :, 5] = True
    assert_identical(out.isnan(), where)
    assert_identical(out[~where], clean[~where])


def test_wgrad_groups_of_no_expert_are_not_read():
    call = fp8_wgrad_operands((4, 0, 130), 70, 72)
    want = moe_ops.grouped_gemm_fp8_wgrad(**call)
    used = torch.tensor([True, False, True, True])
    for name in ("grad", "a"):
        call[name].view(torch.uint8).unflatten(1, (4, 128))[:, ~used] = 0x7F
        call[f"{name}_scale"][~used] = torch.nan
    assert_identical(moe_ops.grouped_gemm_fp8_wgrad(**call), want)


@pytest.mark.parametrize("counts", [(3, 2), (270, 133)], ids=str)
def test_wgrad_error_of_rounded_operands(counts):
    """Against the product of the numbers before rounding: at most the steps of both operands, and
    as errors have any sign, about 4 % of the norm."""
    grad, a = torch.randn(sum(counts), 200), torch.randn(sum(counts), 130)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    operands, steps = [], []
    for x in (grad, a):
        q, scale = moe_ops.quantize_fp8_columns(x, offsets)
        operands += [q, scale]
        of_rows = torch.cat(
            [
                scale[int(begin) // 128 + e :].repeat_interleave(128, 0)[: int(end - begin)]
                for e, (begin, end) in enumerate(itertools.pairwise(offsets))
            ]
        )
        steps.append(torch.maximum(x.double().abs() / 16, of_rows.double() / 1024) * (1 + 1e-6))
    out = moe_ops.grouped_gemm_fp8_wgrad(*operands, offsets)
    grad, a = grad.double(), a.double()
    expected = reference.grouped_gemm_wgrad(grad, a, offsets)
    bound = reference.grouped_gemm_wgrad(steps[0], a.abs() + steps[1], offsets)
    bound += reference.grouped_gemm_wgrad(grad.abs(), steps[1], offsets)
    assert bool(((out.double() - expected).abs() <= bound).all())
    assert (out.double() - expected).norm() <= 0.045 * expected.norm()


@pytest.mark.cpu_only
@out_dtypes
def test_wgrad_same_bits_for_any_thread_count(dtype, set_threads):
    call = fp8_wgrad_operands((131, 0, 340, 3), 400, 300)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        runs.append(moe_ops.grouped_gemm_fp8_wgrad(**call, out_dtype=dtype))
    for run in runs[1:]:
        assert_identical(run, runs[0])


def test_wgrad_opcheck():
    call = fp8_wgrad_operands((2, 0, 3), 20, 13)
    # test_schema compares arguments before and after by arithmetic that torch does not have for
    # float8 tensors.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.moe_ops.grouped_gemm_fp8_wgrad.default
    torch.library.opcheck(op, (*call.values(), torch.bfloat16), test_utils=tests)


@pytest.mark.parametrize("name", ["grad_scale", "a_scale"])
def test_wgrad_no_gradient(name):
    call = fp8_wgrad_operands((2, 0, 3), 20, 13)
    want = moe_ops.grouped_gemm_fp8_wgrad(**call)
    call[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"fp8_wgrad: .*{name} requires one"):
        moe_ops.grouped_gemm_fp8_wgrad(**call)
    with torch.no_grad():
        assert_identical(moe_ops.grouped_gemm_fp8_wgrad(**call), want)


@pytest.mark.parametrize("with_main", [False, True], ids=["new", "main_grad"])
def test_wgrad_compile(with_main):
    call = fp8_wgrad_operands((2, 0, 3), 20, 13)
    main = torch.randn(2, 3, 20, 13) if with_main else [None, None]
    main = main[0].expand(2, 3, 20, 13).clone() if with_main else main
    compiled = torch.compile(moe_ops.grouped_gemm_fp8_wgrad, fullgraph=True, backend="aot_eager")
    got = compiled(**call, main_grad=main[0])
    assert_identical(got, moe_ops.grouped_gemm_fp8_wgrad(**call, main_grad=main[1]))


def test_wgrad_autocast_changes_nothing():
    call = fp8_wgrad_operands((2, 0, 3), 20, 13)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = moe_ops.grouped_gemm_fp8_wgrad(**call)
    assert_identical(out, moe_ops.grouped_gemm_fp8_wgrad(**call))


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"grad": torch.zeros(20, 384)}, "grad", "float32"),
        ({"grad": torch.zeros(384).to(F8)}, "grad", "[384]"),
        ({"grad": torch.zeros(20, 383).to(F8)}, "grad", "[20, 383]"),
        ({"grad_scale": torch.zeros(3, 19)}, "grad_scale", "[3, 19]"),
        ({"grad_scale": torch.zeros(3, 20).half()}, "grad_scale", "float16"),
        ({"grad_scale": torch.zeros(20)}, "grad_scale", "[20]"),
        ({"a": torch.zeros(13, 384).to(torch.float8_e5m2)}, "a", "float8_e5m2"),
        ({"a": torch.zeros(13, 512).to(F8)}, "a", "[13, 512]"),
        ({"a": torch.zeros(13, 512).to(F8), "a_scale": torch.zeros(4, 13)}, "a_scale", "[4, 13]"),
        ({"expert_offsets": torch.zeros(5).int()}, "a_scale", "3"),
        ({"expert_offsets": torch.zeros(1).int()}, "expert_offsets", "[1]"),
        ({"expert_offsets": torch.zeros(4)}, "expert_offsets", "float32"),
        ({"out_dtype": torch.float64}, "out_dtype", "float64"),
        ({"main_grad": torch.zeros(3, 20, 13).double()}, "main_grad", "float64"),
        ({"main_grad": torch.zeros(3, 20, 12)}, "main_grad", "[3, 20, 12]"),
        ({"main_grad": torch.zeros(2, 20, 13)}, "main_grad", "[2, 20, 13]"),
        ({"main_grad": torch.zeros(20, 13)}, "main_grad", "[20, 13]"),
        ({"main_grad": torch.zeros(3, 13, 20).mT}, "main_grad", "strides"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wgrad_bad_input(change, name, got, device, bad_input):
    call = {**fp8_wgrad_operands((2, 0, 3), 20, 13), **change}
    if device == "meta":
        call = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with bad_input("grouped_gemm_fp8_wgrad", name, got):
        moe_ops.grouped_gemm_fp8_wgrad(**call)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("offsets", "got"), [((0, 3, 2, 5), "3 then 2"), ((0, 2, 2, 128), "128"), ((1, 2, 2, 5), "1")]
)
def test_wgrad_bad_offsets(offsets, got, bad_input):
    call = fp8_wgrad_operands((2, 0, 3), 20, 13)
    call["expert_offsets"] = torch.tensor(offsets)
    with bad_input("grouped_gemm_fp8_wgrad", "expert_offsets", got):
        moe_ops.grouped_gemm_fp8_wgrad(**call)

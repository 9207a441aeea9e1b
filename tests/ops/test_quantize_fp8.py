"""quantize_fp8, quantize_fp8_columns, and the quantizer of weights beside them."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.op_case import OpCase

import moe_ops
from moe_ops import reference
from moe_ops.quant import dequantize_fp8_blocks, quantize_fp8_blocks
from moe_ops.quant.fp8 import fuse_fp8_gate_up
from moe_ops.reference.quantize_fp8 import dequantize_rows
from moe_ops.testing import VIEWS, as_strided_copy, assert_identical, poisoned, short

OP_CASES = {
    "quantize_fp8": OpCase(
        lambda s: {"x": s.narrow(s.t, s.h)}, free_dims={"x": {0, 1}}, kind="quantized"
    ),
    "quantize_fp8_columns": OpCase(
        lambda s: {
            "x": s.narrow(s.t, s.h),
            "expert_offsets": s.offsets(),
            "row_to_slot": s.order(),
            "topk_weights": s.weights(),
        },
        free_dims={"x": {1}, "expert_offsets": {0}},
        kind="quantized",
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)
# Around vectors of every instruction set and around blocks.
WIDTHS = (1, 3, 7, 8, 15, 16, 17, 31, 64, 127, 128, 129, 200, 255, 256, 257, 640, 1000)


def check(x):
    """Checks for the same bits as the reference; returns codes and scales."""
    want_q, want_scale = reference.quantize_fp8(x)
    with poisoned(want_q, want_scale):
        q, scale = moe_ops.quantize_fp8(x)
    assert q.dtype == torch.float8_e4m3fn
    assert q.is_contiguous() and scale.is_contiguous()
    nan = want_q.isnan()
    assert_identical(q.isnan(), nan)
    assert_identical(
        q.view(torch.uint8).masked_fill(nan, 0), want_q.view(torch.uint8).masked_fill(nan, 0)
    )
    assert_identical(scale, want_scale)
    return q, scale


@pytest.mark.parametrize("width", WIDTHS)
@dtypes
def test_sizes(dtype, width):
    x = torch.randn(9, width) * 10 ** (6 * torch.rand(9, 1) - 3)
    check(x.to(dtype))


@pytest.mark.parametrize("shape", [(0, 7), (0, 0), (5, 0), (1, 1), (3000, 129)], ids=str)
@dtypes
def test_shapes(dtype, shape):
    q, scale = check(torch.randn(shape).to(dtype))
    assert q.shape == shape
    assert scale.shape == (shape[0], -(-shape[1] // 128))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@dtypes
def test_views(dtype, view):
    x = torch.randn(6, 150).to(dtype)
    check(as_strided_copy(x, view))


def test_every_code_and_every_middle():
    """Numbers whose block has the scale 1: each code comes back, and a number in the middle of two
    goes to the even one."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448
    middles = (codes[1:] + codes[:-1]) / 2
    row = torch.cat([codes, codes[-1:]])[None]
    for sign in (1, -1):
        q, scale = check(sign * row)
        assert_identical(scale, torch.ones(1, 1))
        assert_identical(q.float(), sign * row)
        q, scale = check(sign * torch.cat([middles, codes[-2:]])[None])
        assert_identical(scale, torch.ones(1, 1))
        assert bool((q.view(torch.uint8)[0, :126] % 2 == 0).all())
    # Just beside the middle, the nearer one.
    for beside, index in (
        (torch.nextafter(middles, middles + 1), 1),
        (torch.nextafter(middles, -middles), 0),
    ):
        q, _ = check(torch.cat([beside, codes[-2:]])[None])
        assert_identical(q[0, :126].float(), codes[index : index + 126])


@dtypes
def test_error(dtype):
    """At most 1/16 of a number, or 2^-10 of the scale; and the codes fill the range."""
    x = (torch.randn(64, 384) * torch.rand(64, 384) ** 8).to(dtype)
    q, scale = moe_ops.quantize_fp8(x)
    back = dequantize_rows(q, scale.double())
    bound = torch.maximum(x.double().abs() / 16, scale.double().repeat_interleave(128, 1) / 1024)
    assert bool(((back - x.double()).abs() <= bound * (1 + 1e-6)).all())
    assert bool((q.float().unflatten(1, (3, 128)).abs().amax(2) == 448).all())


@dtypes
def test_zeros_keep_their_signs(dtype):
    x = torch.zeros(3, 200).to(dtype)
    x[1] = -0.0
    x[2, 130] = 5
    q, scale = check(x)
    assert_identical(scale[:2], torch.full((2, 2), 2.0**-126))
    assert_identical(q.float()[:2], torch.zeros(2, 200))
    assert bool(q.view(torch.uint8)[1].eq(0x80).all())


def test_tiny_and_huge_numbers():
    """Scales stay normal numbers; nothing overflows on the way."""
    smallest, largest = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    x = torch.zeros(6, 128)
    for row, value in enumerate(
        (2.0**-149, smallest, 447 * smallest, 449 * smallest, largest, 1e38)
    ):
        x[row, row] = value
        x[row, 50] = -value / 3
    q, scale = check(x)
    assert bool((scale >= smallest).all() and scale.isfinite().all())
    assert bool((q.float().abs() <= 448).all())


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@dtypes
def test_a_block_that_is_not_finite(dtype, value):
    x = torch.randn(4, 300).to(dtype)
    want_q, want_scale = check(x)
    x[2, 140] = value
    q, scale = check(x)
    hit = torch.zeros(4, 300, dtype=torch.bool)
    hit[2, 128:256] = True
    assert_identical(q.isnan(), hit)
    assert_identical(scale.isnan(), hit[:, ::128])
    assert_identical(q.float()[~hit], want_q.float()[~hit])
    assert_identical(scale[~hit[:, ::128]], want_scale[~hit[:, ::128]])


@pytest.mark.cpu_only
def test_same_bits_for_any_thread_count(set_threads):
    x = torch.randn(300, 500)
    runs = []
    for threads in (1, 2):
        set_threads(threads)
        runs.append(moe_ops.quantize_fp8(x))
    for a, b in zip(*runs, strict=True):
        assert_identical(a.float(), b.float())


# --- columns

# Experts that end inside a group, on its edge and just after it; empty ones at every place.
COUNTS = ((0,), (5,), (0, 128, 0, 1), (129, 0, 127, 256), (3, 0, 2, 300, 0), (0, 0, 70))


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def check_columns(x, offsets, *slots):
    """Checks for the same bits as the reference; returns codes and scales."""
    want_q, want_scale = reference.quantize_fp8_columns(x, offsets, *slots)
    with poisoned(want_q, want_scale):
        q, scale = moe_ops.quantize_fp8_columns(x, offsets, *slots)
    num_rows = len(x) if not slots else len(slots[0])
    groups = num_rows // 128 + len(offsets) - 1
    assert q.dtype == torch.float8_e4m3fn and q.shape == (x.shape[1], 128 * groups)
    assert scale.shape == (groups, x.shape[1])
    assert q.is_contiguous() and scale.is_contiguous()
    assert_identical(q.isnan(), want_q.isnan())
    nan = want_q.isnan()
    assert_identical(
        q.view(torch.uint8).masked_fill(nan, 0), want_q.view(torch.uint8).masked_fill(nan, 0)
    )
    assert_identical(scale, want_scale)
    return q, scale


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@dtypes
def test_columns(dtype, counts, width):
    x = torch.randn(sum(counts) + 3, width) * 10 ** (6 * torch.rand(1, width) - 3)
    check_columns(x.to(dtype), offsets_of(counts))


@pytest.mark.parametrize("shape", [(0, 7), (0, 0), (300, 0)], ids=str)
def test_columns_of_empty_tensors(shape):
    check_columns(torch.randn(shape), offsets_of((shape[0], 0)))


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=short)
@dtypes
def test_columns_of_tokens(dtype, index_dtype, weight_dtype):
    """Rows through row_to_slot are those that permute gathers, times the weights of their slots."""
    x = torch.randn(150, 70).to(dtype)
    ids = torch.randint(-1, 4, (150, 2))
    offsets, row_to_slot, _ = moe_ops.sort_by_expert(ids, 4)
    slots = [row_to_slot.to(index_dtype)]
    if weight_dtype is not None:
        slots.append(torch.rand(150, 2).to(weight_dtype))
    q, scale = check_columns(x, offsets, *slots)
    if weight_dtype is None:
        want = moe_ops.quantize_fp8_columns(moe_ops.permute(x, offsets, row_to_slot), offsets)
        assert_identical(q.float(), want[0].float())
        assert_identical(scale, want[1])


def test_columns_go_back_to_rows():
    """At most 1/16 of a number, or 2^-10 of its scale; each at its documented place."""
    counts = (130, 0, 3, 256)
    x = torch.randn(sum(counts), 90) * torch.rand(sum(counts), 90) ** 8
    offsets = offsets_of(counts)
    q, scale = moe_ops.quantize_fp8_columns(x, offsets)
    wide = scale.double().repeat_interleave(128, 0).T
    for e, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        first = 128 * (begin // 128 + e)
        at = slice(first, first + end - begin)
        rows = x[begin:end].double().T
        error = (q[:, at].double() * wide[:, at] - rows).abs()
        bound = torch.maximum(rows.abs() / 16, wide[:, at] / 1024)
        assert bool((error <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_views_of_columns(view):
    x = torch.randn(140, 50)
    check_columns(as_strided_copy(x, view), offsets_of((1, 139)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_columns_that_are_not_finite(value):
    """A group of a column is spoilt, and neither its neighbors nor what no row fills."""
    x = torch.randn(205, 70)
    offsets = offsets_of((130, 70))
    clean_q, clean_scale = moe_ops.quantize_fp8_columns(x, offsets)
    x[129, 65] = value
    x[200:] = torch.nan  # rows without an expert
    q, scale = check_columns(x, offsets)
    hit = torch.zeros(q.shape, dtype=torch.bool)
    hit[65, 128:130] = True
    assert_identical(q.isnan(), hit)
    assert_identical(q.float()[~hit], clean_q.float()[~hit])
    spoilt = torch.zeros(scale.shape, dtype=torch.bool)
    spoilt[1, 65] = True
    assert_identical(scale.isnan(), spoilt)
    assert_identical(scale[~spoilt], clean_scale[~spoilt])


@pytest.mark.cpu_only
def test_same_columns_for_any_thread_count(set_threads):
    x, offsets = torch.randn(1000, 500), offsets_of((300, 0, 700))
    runs = []
    for threads in (1, 2):
        set_threads(threads)
        runs.append(moe_ops.quantize_fp8_columns(x, offsets))
    for a, b in zip(*runs, strict=True):
        assert_identical(a.float(), b.float())


# --- torch


@dtypes
def test_opcheck(dtype):
    x = torch.randn(4, 150).to(dtype)
    torch.library.opcheck(torch.ops.moe_ops.quantize_fp8.default, (x,))


@dtypes
def test_opcheck_of_columns(dtype):
    x = torch.randn(4, 15).to(dtype)
    op = torch.ops.moe_ops.quantize_fp8_columns.default
    torch.library.opcheck(op, (x, offsets_of((1, 2))))
    torch.library.opcheck(op, (x, offsets_of((3, 4)), torch.randperm(8), torch.rand(4, 2)))


def test_columns_have_no_gradient():
    x, offsets = torch.randn(4, 15, requires_grad=True), offsets_of((1, 2))
    with pytest.raises(NotImplementedError, match=r"quantize_fp8_columns: .*x requires one"):
        moe_ops.quantize_fp8_columns(x, offsets)
    with torch.no_grad():
        check_columns(x, offsets)


def test_compiled_columns():
    x, offsets = torch.randn(140, 15), offsets_of((1, 132))
    compiled = torch.compile(moe_ops.quantize_fp8_columns, fullgraph=True, backend="aot_eager")
    want = moe_ops.quantize_fp8_columns(x, offsets)
    for a, b in zip(compiled(x, offsets), want, strict=True):
        assert_identical(a.float(), b.float())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(3)}, "x", "[3]"),
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "x", "float64"),
        ({"expert_offsets": torch.zeros(1).int()}, "expert_offsets", "[1]"),
        ({"expert_offsets": torch.zeros(3)}, "expert_offsets", "float32"),
        ({"row_to_slot": torch.zeros(5).int()}, "row_to_slot", "5"),
        ({"row_to_slot": torch.zeros(6)}, "row_to_slot", "float32"),
        ({"row_to_slot": torch.zeros(6, 1).int()}, "row_to_slot", "[6, 1]"),
        ({"topk_weights": torch.zeros(3, 3)}, "topk_weights", "[3, 3]"),
        ({"topk_weights": torch.zeros(2, 2)}, "topk_weights", "[2, 2]"),
        ({"topk_weights": torch.zeros(3, 2).int()}, "topk_weights", "int32"),
        ({"row_to_slot": None}, "topk_weights", "alone"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_columns(change, name, got, device, bad_input):
    call = {
        "x": torch.zeros(3, 4),
        "expert_offsets": torch.tensor([0, 2, 5]),
        "row_to_slot": torch.arange(6),
        "topk_weights": torch.ones(3, 2),
        **change,
    }
    call = {k: None if v is None else v.to(device) for k, v in call.items()}
    with bad_input("quantize_fp8_columns", name, got):
        moe_ops.quantize_fp8_columns(**call)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("name", "values", "got"),
    [
        ("expert_offsets", (0, 2, 7), "7"),
        ("expert_offsets", (0, 3, 2), "3 then 2"),
        ("row_to_slot", (0, 1, 2, 3, 4, 6), "6"),
        ("row_to_slot", (0, -1, 2, 3, 4, 5), "-1"),
    ],
)
def test_bad_values_of_columns(name, values, got, bad_input):
    call = {"expert_offsets": torch.tensor([0, 2, 5]), "row_to_slot": torch.arange(6)}
    call[name] = torch.tensor(values)
    with bad_input("quantize_fp8_columns", name, got):
        moe_ops.quantize_fp8_columns(torch.zeros(3, 4), **call)


def test_no_gradient():
    x = torch.randn(4, 150, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"quantize_fp8: .*x requires one"):
        moe_ops.quantize_fp8(x)
    with torch.no_grad():
        check(x)


def test_compile():
    x = torch.randn(4, 150)
    compiled = torch.compile(moe_ops.quantize_fp8, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), moe_ops.quantize_fp8(x), strict=True):
        assert_identical(a.float(), b.float())


def test_autocast_keeps_the_type():
    x = torch.randn(4, 150)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = moe_ops.quantize_fp8(x)
    for a, b in zip(got, moe_ops.quantize_fp8(x), strict=True):
        assert_identical(a.float(), b.float())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(3), "[3]"),
        (torch.zeros(3, 4, 5), "[3, 4, 5]"),
        (torch.zeros(3, 4, dtype=torch.float64), "float64"),
        (torch.zeros(3, 4, dtype=torch.int8), "int8"),
        (torch.zeros(3, 4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
    ids=["1d", "3d", "fp64", "int8", "fp8"],
)
def test_bad_input(x, got, device, bad_input):
    with bad_input("quantize_fp8", "x", got):
        moe_ops.quantize_fp8(x.to(device))


# --- weights


@pytest.mark.parametrize(
    "shape", [(128, 128), (1, 1), (2, 300, 200), (2, 3, 129, 257), (1, 0, 5), (0, 64, 64)], ids=str
)
@pytest.mark.parametrize("view", ["contiguous", "transposed"])
@dtypes
def test_weight_blocks(dtype, view, shape):
    w = as_strided_copy((torch.randn(shape) * torch.rand(shape) ** 4).to(dtype), view)
    q, scale = quantize_fp8_blocks(w)
    assert q.dtype == torch.float8_e4m3fn and q.shape == w.shape and q.is_contiguous()
    assert scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    back = dequantize_fp8_blocks(q, scale, torch.float64)
    for o in range(scale.shape[-2]):
        for d in range(scale.shape[-1]):
            at = (..., slice(128 * o, 128 * (o + 1)), slice(128 * d, 128 * (d + 1)))
            block, got, s = w[at].double(), back[at], scale[..., o, d].double()[..., None, None]
            assert_identical(block.abs().amax((-2, -1)).div(448).float(), scale[..., o, d])
            bound = torch.maximum(block.abs() / 16, s / 1024) * (1 + 1e-6)
            assert bool(((got - block).abs() <= bound).all())


def test_weights_of_one_row_are_rows():
    """Over one row, a 128 x 128 block is a 1 x 128 one."""
    w = torch.randn(1, 300)
    q, scale = quantize_fp8_blocks(w)
    want_q, want_scale = reference.quantize_fp8(w)
    assert_identical(q.float(), want_q.float())
    assert_identical(scale, want_scale)


def test_error_of_normal_weights():
    w = torch.randn(512, 512)
    back = dequantize_fp8_blocks(*quantize_fp8_blocks(w))
    assert 0.02 < (back - w).norm() / w.norm() < 0.03


def test_fused_gate_up():
    gate, up = torch.randn(2, 128, 200), 5 * torch.randn(2, 128, 200)
    q, scale = fuse_fp8_gate_up(*quantize_fp8_blocks(gate), *quantize_fp8_blocks(up))
    want_q, want_scale = quantize_fp8_blocks(torch.cat([gate, up], 1))
    assert_identical(q.float(), want_q.float())
    assert_identical(scale, want_scale)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize_fp8_blocks(torch.zeros(3)), r"w must be .*\[\.\.\., O, D\], got float32"),
        (lambda: quantize_fp8_blocks(torch.zeros(3, 3).int()), "got int32"),
        (lambda: quantize_fp8_blocks(torch.tensor([[torch.nan]])), "must be finite"),
        (
            lambda: dequantize_fp8_blocks(torch.zeros(3, 3), torch.zeros(1, 1)),
            "q must be float8_e4m3fn .*got float32",
        ),
        (
            lambda: dequantize_fp8_blocks(
                torch.zeros(130, 3).to(torch.float8_e4m3fn), torch.zeros(1, 1)
            ),
            r"float32 \[2, 1\], got float32 of shape \[1, 1\]",
        ),
        (
            lambda: fuse_fp8_gate_up(
                *quantize_fp8_blocks(torch.zeros(64, 8)), *quantize_fp8_blocks(torch.zeros(64, 8))
            ),
            r"I a multiple of 128, got \[64, 8\]",
        ),
    ],
)
def test_bad_weights(call, words):
    with pytest.raises(ValueError, match=words):
        call()

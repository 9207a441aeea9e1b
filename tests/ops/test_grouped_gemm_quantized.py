from __future__ import annotations

import itertools

import pytest
import torch
from tests.helpers.op_case import OpCase
from tests.helpers.quantized import (
    STORED_GROUPS,
    STORED_RECORDS,
    check_grouped_gemm_quantized,
    check_grouped_gemm_quantized_on_device,
    check_stored_gemm,
    label_of,
    quantized,
    quantized_gemm_operands,
    stored_gemm_call,
)
from torch.func import grad, jvp, vmap

import moe_ops
from moe_ops import reference
from moe_ops.ops._quantized import reads_stored
from moe_ops.quant import dequantize_weight
from moe_ops.testing import as_strided_copy, assert_identical, short


def int8_call(s):
    return {
        "a": s.narrow(s.n, s.h),
        "b": torch.randint(-127, 128, (s.e, s.o, s.h)).to(torch.int8),
        "b_scale": torch.rand(s.e, s.o),
        "expert_offsets": s.offsets(),
        "bias": s.narrow(s.e, s.o),
        "format": "int8",
    }


OP_CASES = {
    "grouped_gemm_quantized": OpCase(
        int8_call,
        kind="quantized",
        free_dims={"a": (0,)},
        too_many_bytes=lambda: moe_ops.grouped_gemm_quantized(
            torch.empty(2**52, 0),
            torch.empty(1, 2**10, 0, dtype=torch.int8),
            torch.ones(1, 2**10),
            torch.tensor([0, 0]),
            format="int8",
        ),
    )
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ((8, 32), (4, 32), (4, 64), (4, 128))
NAMES = ("int8", "int4 g32", "int4 g64", "int4 g128")
formats = pytest.mark.parametrize(("bits", "group"), FORMATS, ids=NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Unless a test asks for more: the reference is thousands of small products."""
    set_threads(1)


@pytest.fixture
def check(backend):
    """On CUDA rows stay as they are, and weights become numbers of their dtype."""
    on_cpu = backend == "cpu"
    return check_grouped_gemm_quantized if on_cpu else check_grouped_gemm_quantized_on_device


@dtypes
@formats
@pytest.mark.parametrize("counts", [(1,), (3, 0, 2), (8,), (40, 0, 9)], ids=str)
def test_sizes(bits, group, dtype, counts, check):
    depths = (1, 33, 64, 193) if bits == 8 else (group, 3 * group)
    for in_features in depths:
        for out_features in (1, 33, 130):
            check(
                quantized_gemm_operands(
                    counts, in_features, out_features, dtype, bits, group, tail=2, bias=True
                )
            )


@dtypes
@formats
def test_a_dense_layer(bits, group, dtype, check):
    """One expert with many features, as a model's head, of one token and of several."""
    for rows in (1, 2, 12):
        check(quantized_gemm_operands((rows,), 256, 2100, dtype, bits, group))


# --- formats that are decoded to float32, and those of integers where rows may not be rounded

# In registers for up to 2 rows or 4, and in cache; empty experts.
COUNTS = ((1,), (3, 0, 2), (0, 4, 5), (1, 0, 41))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kind", [*STORED_GROUPS, *STORED_RECORDS])
def test_stored_formats(kind, counts, backend):
    """Whole blocks of vectors and ends, features that no four rows divide, with gradients."""
    unit = STORED_RECORDS[kind] if kind in STORED_RECORDS else STORED_GROUPS[kind][1]
    depths = (1, 33, 127, 129, 385) if unit == 1 else (unit, 3 * unit, 5 * unit)
    check, features = check_stored_gemm, (1, 35, 130)
    if backend != "cpu":
        check, depths, features = check_grouped_gemm_quantized_on_device, depths[1:2], (35,)
    for in_features in depths:
        for out_features in features:
            for dtype in (torch.float32, torch.bfloat16):
                check(stored_gemm_call(kind, counts, in_features, out_features, dtype))


def test_the_limit_of_what_cuda_kernels_read_as_it_is_stored():
    assert reads_stored(3 * 64, 3) and not reads_stored(3 * 64 + 1, 3)
    with moe_ops.batch_invariant():
        assert reads_stored(10**6, 1)


@pytest.mark.cpu_only
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    "kind", ["int4 g96 zero", "int8 g32 float16", "int4 g32", "int8", "fp8", "e4m3", "q4_k"]
)
def test_gradients_through_stored_formats(kind, counts):
    for dtype in (torch.float32, torch.float16):
        check_stored_gemm(stored_gemm_call(kind, counts, 768, 40, dtype), ["a", "bias"])


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", [*STORED_GROUPS, *STORED_RECORDS])
def test_stored_bits_do_not_depend_on_threads_and_in_one_mode_not_on_neighbors(kind, set_threads):
    depth = 800 if "g160" in kind else 1536
    call = stored_gemm_call(kind, (1, 3, 8), depth, 70, torch.float32)
    set_threads(1)
    y = moe_ops.grouped_gemm_quantized(**call)
    set_threads(2)
    assert_identical(moe_ops.grouped_gemm_quantized(**call), y)
    one = {name: t[2:] for name, t in call.items() if name[0] == "b"}
    one["format"] = kind
    with moe_ops.batch_invariant():
        y = moe_ops.grouped_gemm_quantized(**call)
        offsets = torch.tensor([0, 1])
        alone = moe_ops.grouped_gemm_quantized(call["a"][6:7], **one, expert_offsets=offsets)
    assert_identical(alone[0], y[6])


@pytest.mark.cpu_only
@pytest.mark.parametrize("rows", [1, 20])
def test_weights_that_are_not_finite_or_subnormal(rows):
    """e4m3 has no infinity, but NaN of either sign; scales of MXFP4 are powers from 2^-127 on, or
    NaN."""
    cases = itertools.product(("fp8", "e4m3"), (0x7F, 0xFF), (torch.float32, torch.bfloat16))
    for kind, code, dtype in cases:
        call = stored_gemm_call(kind, (rows,), 200, 9, dtype)
        call["b"].view(torch.uint8)[0, 4, 137] = code
        y = moe_ops.grouped_gemm_quantized(**call)[:rows]
        assert y[:, 4].isnan().all() and y.isnan().sum() == rows
    call = stored_gemm_call("mxfp4", (rows,), 96, 9, torch.float32)
    call["b_scale"][0, 4, 1] = 255
    # Of one sign: infinity in the place of NaN would stay infinity in the sum.
    call["b"].view(torch.uint8)[0, 4, 16:32] = 0x11
    call["a"].abs_()
    y = moe_ops.grouped_gemm_quantized(**call)[:rows]
    assert y[:, 4].isnan().all() and y.isnan().sum() == rows
    two = stored_gemm_call("nvfp4", (rows,), 96, 9, torch.float32)
    for byte, row in ((0x7F, 4), (0xFF, 6)):  # e4m3's NaN of either sign
        two["b_scale"][0, row, 4 + 2] = byte
    y = moe_ops.grouped_gemm_quantized(**two)[:rows]
    assert y[:, [4, 6]].isnan().all() and y.isnan().sum() == 2 * rows
    call["a"] *= 2.0**120
    call["b_scale"][:] = torch.arange(3, dtype=torch.uint8)
    check_stored_gemm(call)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 6, 20])
@pytest.mark.parametrize("kind", ["fp8", "e4m3"])
def test_every_code_of_e4m3_is_exact(kind, rows, dtype):
    call = stored_gemm_call(kind, (rows,), 254, 5, dtype)
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[(numbers & 127) != 127]
    for o in range(5):
        call["b"].view(torch.uint8)[0, o] = numbers.roll(o)
    call["b_scale"].fill_(0.25)
    del call["bias"]
    wanted = call["b"][0].to(torch.float32).mul(0.25).add(0.0).T.to(dtype)  # No -0.
    for k in range(0, 254 - rows, rows):
        call["a"] = torch.eye(254, dtype=dtype)[k : k + rows]
        assert_identical(moe_ops.grouped_gemm_quantized(**call), wanted[k : k + rows])


@formats
def test_the_same_bits_for_any_layout_and_number_of_threads(bits, group, set_threads):
    call = quantized_gemm_operands((5, 40), 128, 600, torch.bfloat16, bits, group, bias=True)
    set_threads(1)
    y = moe_ops.grouped_gemm_quantized(**call)
    set_threads(2)
    assert_identical(moe_ops.grouped_gemm_quantized(**call), y)
    strided = as_strided_copy(call["a"], "step2_last")
    call |= {"a": strided, "expert_offsets": torch.tensor([0, 5, 45])}
    assert_identical(moe_ops.grouped_gemm_quantized(**call), y)


def test_nothing():
    call = quantized_gemm_operands((0, 0), 64, 8, torch.float32, 4, 32)
    assert moe_ops.grouped_gemm_quantized(**call).shape == (0, 8)


@formats
def test_gradients_are_those_of_the_dequantized_weights(bits, group):
    """Exact where a gradient is wanted, for adapters on top of a quantized model."""
    call = quantized_gemm_operands((5, 40), 128, 24, torch.float32, bits, group, tail=2, bias=True)
    grad, results = torch.randn(47, 24), []
    for op, dtype in (
        (moe_ops.grouped_gemm_quantized, torch.float32),
        (reference.grouped_gemm_quantized, torch.float64),
    ):
        leaves = {n: call[n].to(dtype).requires_grad_() for n in ("a", "bias")}
        y = op(**call | leaves)
        results.append((y, *torch.autograd.grad(y, leaves.values(), grad.to(dtype))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@formats
def test_transforms_are_those_of_the_formula(bits, group):
    call = quantized_gemm_operands((5, 12), 128, 24, torch.float32, bits, group, bias=True)
    weights = dequantize_weight(call["b"], call["b_scale"], call["format"])

    def function(a):
        return moe_ops.grouped_gemm_quantized(**{**call, "a": a})

    def formula(a):
        return moe_ops.grouped_gemm(a, weights, call["expert_offsets"], bias=call["bias"])

    with pytest.raises(NotImplementedError, match="grouped_gemm_quantized: forward-mode AD"):
        jvp(function, (call["a"],), (call["a"],))
    got, wanted = (grad(lambda a, f=f: f(a).sum())(call["a"]) for f in (function, formula))
    torch.testing.assert_close(got, wanted)
    batch = torch.stack([call["a"], call["a"] * 0.5])
    for y, a in zip(vmap(function)(batch), batch, strict=True):
        assert_identical(y, function(a))


@formats
def test_weights_are_what_quant_says(bits, group):
    w = torch.randn(1, 16, 128)
    q, scale = quantized(w, bits, group)
    format = label_of(bits, group)
    eye = torch.eye(128)
    y = moe_ops.grouped_gemm_quantized(eye, q, scale, torch.tensor([0, 128]), format=format)
    torch.testing.assert_close(y.T, dequantize_weight(q, scale, format)[0], rtol=1e-5, atol=1e-6)


BYTES = torch.zeros(1, 8, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.randn(5, 64, dtype=torch.float64)}, "a must be float32, bfloat16 or float16"),
        (
            {"b": torch.zeros(1, 8, 64)},
            r"b must be int8 \[E, O, D\] for int8, got float32 of shape \[1, 8, 64\]",
        ),
        ({"b": torch.zeros(1, 8, 63, dtype=torch.int8)}, "b must have rows of K = 64 weights"),
        ({"b_scale": torch.zeros(1, 7)}, r"b_scale must be float32 \[1, 8\] for int8, got float32"),
        ({"b_scale": torch.zeros(1, 8).bfloat16()}, "b_scale must be float32.*, got bfloat16"),
        (
            {"b_zero": torch.zeros(1, 8, dtype=torch.uint8)},
            "b_zero must be None for int8, got shape",
        ),
        ({"format": "int4 g64"}, r"b must be uint8 \[E, O, D/2\] for int4 g64, got int8"),
        ({"format": "int4 g64 zero", "b": BYTES}, r"b_scale must be float32 \[1, 8, 2\] for int4"),
        ({"format": "int4 g96", "b": BYTES}, "b must have rows of a multiple of 96 weights for"),
        ({"format": "int4"}, "format must name a format of quantized weights .*, got 'int4'"),
        ({"format": "int8, int8"}, "format must name a format of quantized weights .*, got 'int8,"),
        ({"bias": torch.zeros(1, 7)}, "bias must have"),
        pytest.param(
            {"expert_offsets": torch.tensor([0, 6])}, "expert_offsets", marks=pytest.mark.cpu_only
        ),
    ],
)
def test_bad_calls(change, message):
    call = {
        "a": torch.randn(5, 64),
        "b": torch.zeros(1, 8, 64, dtype=torch.int8),
        "b_scale": torch.ones(1, 8),
        "expert_offsets": torch.tensor([0, 5]),
        "format": "int8",
    }
    with pytest.raises(ValueError, match=f"grouped_gemm_quantized: {message}"):
        moe_ops.grouped_gemm_quantized(**call | change)

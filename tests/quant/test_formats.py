"""Storage formats of quantised weights."""

from __future__ import annotations

import math

import pytest
import torch

from moe_ops import quant
from moe_ops.quant import formats


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 128), (3, 5, 256), (2, 1, 4, 32)])
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_int8_is_within_half_a_step(dtype, shape, layout):
    w = torch.randn(shape, dtype=dtype)
    if layout == "transposed":
        w = w.transpose(-1, -2).contiguous().transpose(-1, -2)
    q, scale = quant.quantize(w, "int8")
    assert q.dtype == torch.int8 and q.shape == shape and scale.shape == shape[:-1]
    assert int(q.min()) >= -127
    # fp32 arithmetic adds to the half step what rounding a quotient of up to 127 costs.
    step = scale[..., None].double()
    assert ((quant.dequantize(q, scale).double() - w.double()).abs() <= 0.50001 * step).all()
    assert (q.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_within_half_a_step(group_size, dtype):
    w = torch.randn(3, 5, 256, dtype=dtype)
    q, scale = quant.quantize(w, "int4", group_size)
    assert q.dtype == torch.uint8 and q.shape == (3, 5, 128)
    assert scale.shape == (3, 5, 256 // group_size) and scale.dtype == torch.float32
    groups = w.double().unflatten(-1, (-1, group_size))
    error = quant.dequantize(q, scale, torch.float64).unflatten(-1, (-1, group_size)) - groups
    step = scale.double().abs()[..., None]
    # All but what would be +8, which is up to a whole step off.
    top = groups / scale.double()[..., None] > 7.5
    assert (error.abs() <= torch.where(top, 1.00001, 0.50001) * step).all()
    lowest = (groups / scale.double()[..., None]).argmin(-1, keepdim=True)
    largest = groups.gather(-1, lowest).abs()
    assert torch.equal(largest, groups.abs().amax(-1, keepdim=True))
    assert (error.gather(-1, lowest).abs() <= 1e-6 * largest).all()


def test_int4_order_of_nibbles():
    w = torch.zeros(1, 32)
    w[0, :4] = torch.tensor([-8.0, 7.0, 1.0, -2.0])
    q, scale = quant.quantize(w, "int4", 32)
    assert scale.tolist() == [[1.0]]
    assert q[0, :3].tolist() == [0 | (15 << 4), 9 | (6 << 4), 8 | (8 << 4)]
    assert torch.equal(quant.dequantize(q, scale), w)


def test_int4_of_a_positive_largest_number():
    w = torch.zeros(1, 32)
    w[0, :3] = torch.tensor([8.0, -8.0, 3.0])
    w[0, 1] = -7.9
    q, scale = quant.quantize(w, "int4", 32)
    assert scale.item() == -1.0
    assert quant.dequantize(q, scale)[0, :3].tolist() == [8.0, -7.0, 3.0]


@pytest.mark.parametrize(("format", "group_size"), [("int8", None), ("int4", 32)])
def test_extreme_numbers(format, group_size):
    for value in (0.0, 1e-45, 1e-30, 3e38):
        w = torch.full((2, 64), value)
        w[1] *= -0.5
        q, scale = quant.quantize(w, format, group_size)
        back = quant.dequantize(q, scale)
        assert torch.isfinite(back).all()
        assert ((back - w).abs() <= 0.51 * scale.abs().amax() + 1e-44).all()
    assert not quant.dequantize(*quant.quantize(torch.zeros(2, 64), format, group_size)).any()
    for bad in (math.nan, math.inf):
        w = torch.ones(2, 64)
        w[1, 3] = bad
        with pytest.raises(ValueError, match=r"quantize: w must be finite, got"):
            quant.quantize(w, format, group_size)


def test_finer_groups_are_better():
    w = torch.randn(64, 512)
    errors = [relative(quant.dequantize(*quant.quantize(w, "int4", g)), w) for g in (32, 64, 128)]
    errors.insert(0, relative(quant.dequantize(*quant.quantize(w, "int8")), w))
    assert errors == sorted(errors)
    # Normal numbers. int8: the largest of 512 is about 3.2, a step 3.2 / 127, its rms 1 / sqrt(12)
    # of that. int4 g32: 2.1 / 8 likewise.
    assert errors[0] == pytest.approx(3.2 / 127 / 12**0.5, rel=0.1)
    assert errors[1] == pytest.approx(2.3 / 8 / 12**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant.quantize(torch.ones(4), "int8"), r"quantize: w must be a float tensor"),
        (lambda: quant.quantize(torch.ones(4, 4).int(), "int8"), r"got int32 of shape \[4, 4\]"),
        (lambda: quant.quantize(torch.ones(4, 48), "int4", 32), r"multiple of group_size = 32"),
        (lambda: quant.quantize(torch.ones(4, 32), "fp8"), r"'int8' or 'int4', got 'fp8'"),
        (
            lambda: quant.dequantize(torch.ones(4, 32), torch.ones(4)),
            r"dequantize: q must be int8 .* got float32",
        ),
        (
            lambda: quant.dequantize(torch.ones(4, 32).to(torch.int8), torch.ones(3)),
            r"scale of q must be float32 \[4\], got float32 of shape \[3\]",
        ),
        (
            lambda: quant.dequantize(torch.ones(4, 32).to(torch.uint8), torch.ones(4, 3)),
            r"scale of q must be float32 \[4\] and one of 64 / 32, 64 or 128, got",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "label",
    [
        "int8",
        "int4 g64",
        "int4 g96 float16 zero",
        "int8 g32 float16",
        "mxfp4",
        "fp8",
        "q4_k, down q6_k",
        "q4_k, down int8 g32 float16",
        "int4 g32 bfloat16, down q6_k",
    ],
)
def test_labels(label):
    options = formats.options_of_label(label)
    assert formats.label_of_bank(formats.bank_formats("a bank", **options)) == label


@pytest.mark.parametrize("label", ["", "int3", "int4", "int4 g", "int4 g64 float64", "fp8 g32"])
def test_no_labels(label):
    with pytest.raises(ValueError, match=r"^WeightFormat: "):
        formats.options_of_label(label)

"""Storage formats of quantized weights."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from moe_ops import quant
from moe_ops.ops._checks import dtype_name
from moe_ops.quant import formats
from moe_ops.weight_formats import FORMATS, WeightFormat, joined_label, parse_format


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
    q, scale = quant.quantize_weight(w, "int8")
    assert q.dtype == torch.int8 and q.shape == shape and scale.shape == shape[:-1]
    assert int(q.min()) >= -127
    # fp32 arithmetic adds to the half step what rounding a quotient of up to 127 costs.
    step = scale[..., None].double()
    assert (
        (quant.dequantize_weight(q, scale, "int8").double() - w.double()).abs() <= 0.50001 * step
    ).all()
    assert (q.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_within_half_a_step(group_size, dtype):
    format = f"int4 g{group_size}"
    w = torch.randn(3, 5, 256, dtype=dtype)
    q, scale = quant.quantize_weight(w, format)
    assert q.dtype == torch.uint8 and q.shape == (3, 5, 128)
    assert scale.shape == (3, 5, 256 // group_size) and scale.dtype == torch.float32
    groups = w.double().unflatten(-1, (-1, group_size))
    error = (
        quant.dequantize_weight(q, scale, format, torch.float64).unflatten(-1, (-1, group_size))
        - groups
    )
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
    q, scale = quant.quantize_weight(w, "int4 g32")
    assert scale.tolist() == [[1.0]]
    assert q[0, :3].tolist() == [0 | (15 << 4), 9 | (6 << 4), 8 | (8 << 4)]
    assert torch.equal(quant.dequantize_weight(q, scale, "int4 g32"), w)


def test_int4_of_a_positive_largest_number():
    w = torch.zeros(1, 32)
    w[0, :3] = torch.tensor([8.0, -8.0, 3.0])
    w[0, 1] = -7.9
    q, scale = quant.quantize_weight(w, "int4 g32")
    assert scale.item() == -1.0
    assert quant.dequantize_weight(q, scale, "int4 g32")[0, :3].tolist() == [8.0, -7.0, 3.0]


def test_fp8_is_that_of_blocks():
    w = torch.randn(2, 130, 200)
    q, scale = quant.quantize_weight(w, "fp8")
    want, want_scale = quant.quantize_fp8_blocks(w)
    assert torch.equal(q.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scale, want_scale)
    back = quant.dequantize_weight(q, scale, "fp8")
    assert torch.equal(back, quant.dequantize_fp8_blocks(q, scale))


@pytest.mark.parametrize("format", ["int8", "int4 g32"])
def test_extreme_numbers(format):
    for value in (0.0, 1e-45, 1e-30, 3e38):
        w = torch.full((2, 64), value)
        w[1] *= -0.5
        q, scale = quant.quantize_weight(w, format)
        back = quant.dequantize_weight(q, scale, format)
        assert torch.isfinite(back).all()
        assert ((back - w).abs() <= 0.51 * scale.abs().amax() + 1e-44).all()
    zeros = quant.quantize_weight(torch.zeros(2, 64), format)
    assert not quant.dequantize_weight(*zeros, format).any()
    for bad in (math.nan, math.inf):
        w = torch.ones(2, 64)
        w[1, 3] = bad
        with pytest.raises(ValueError, match=r"quantize_weight: w must be finite, got"):
            quant.quantize_weight(w, format)


def test_finer_groups_are_better():
    w = torch.randn(64, 512)
    errors = [
        relative(quant.dequantize_weight(*quant.quantize_weight(w, f), f), w)
        for f in ("int8", "int4 g32", "int4 g64", "int4 g128")
    ]
    assert errors == sorted(errors)
    # Normal numbers. int8: the largest of 512 is about 3.2, a step 3.2 / 127, its rms 1 / sqrt(12)
    # of that. int4 g32: 2.1 / 8 likewise.
    assert errors[0] == pytest.approx(3.2 / 127 / 12**0.5, rel=0.1)
    assert errors[1] == pytest.approx(2.3 / 8 / 12**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant.quantize_weight(torch.ones(4), "int8"), r"quantize_weight: w must be a fl"),
        (lambda: quant.quantize_weight(torch.ones(4, 4).int(), "int8"), r"got int32 of shape"),
        (
            lambda: quant.quantize_weight(torch.ones(4, 48), "int4 g32"),
            r"of w must be a multiple of 32 for int4 g32, got 48; use int8",
        ),
        (
            lambda: quant.quantize_weight(torch.ones(4, 96), "int4 g64"),
            r"must be a multiple of 64 for int4 g64, got 96; use int4 g32",
        ),
        (
            lambda: quant.quantize_weight(torch.ones(4, 32), "mxfp4"),
            r"one of fp8, .*, int8, got 'mxfp4'",
        ),
        (
            lambda: quant.dequantize_weight(torch.ones(4, 32), torch.ones(4), "int8"),
            r"dequantize_weight: q must be int8 .* for int8, got float32",
        ),
        (
            lambda: quant.dequantize_weight(
                torch.ones(4, 32).to(torch.int8), torch.ones(3), "int8"
            ),
            r"scale of q must be float32 \[4\] for int8, got float32 of shape \[3\]",
        ),
        (
            lambda: quant.dequantize_weight(
                torch.ones(4, 32).to(torch.uint8), torch.ones(4, 3), "int4 g32"
            ),
            r"scale of q must be float32 \[4, 2\] for int4 g32, got",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LABELS = (
    "int8",
    "int4 g64",
    "int4 g96 float16 zero",
    "int8 g32 float16",
    "int4 g32 bfloat16",
    "e4m3",
    "e4m3 g128 float16",
    *(name for name, row in FORMATS.items() if row.group),
)
NO_LABELS = (
    "",
    "int3",
    "int4",
    "int4 g",
    "int4 g0",
    "int4 g33",
    "int4 g064",
    "int4 g64 float64",
    "int4 g64 float32",
    "int4 zero g64",
    "int4  g64",
    "int4 g64 zero zero",
    "int8 zero",
    "int8 float16",
    "int8 g32 zero",
    "fp8 g32",
    "e4m3 zero",
    "e4m3 float16",
    "mxfp4 float16",
    "int4 g9999999999",
)


@pytest.mark.parametrize("label", LABELS)
def test_labels(label):
    assert WeightFormat.from_label(label).label == label
    both = formats.formats_of("a bank", f"{label}, int8", (768, 5))
    assert joined_label(both) == ("int8" if label == "int8" else f"{label}, int8")
    assert formats.formats_of("a bank", label, (768, 768))["w_down"].label == label


@pytest.mark.parametrize("label", NO_LABELS)
def test_no_labels(label):
    with pytest.raises(ValueError, match=r"^WeightFormat: "):
        WeightFormat.from_label(label)
    with pytest.raises(ValueError, match=r"^a bank: "):
        formats.formats_of("a bank", label, (64, 64))


# --- the table, in Python and in C++


@pytest.mark.cpu_only
def test_both_tables_are_the_same():
    dev = pytest.importorskip("bench.harness.dev").moe_ops_dev
    wanted = [
        (name, r.bits, r.group, r.rows, r.record, r.head, r.scales, r.row_scales, r.zeros)
        for name, r in FORMATS.items()
    ]
    assert dev.weight_formats() == wanted


@pytest.mark.cpu_only
@pytest.mark.parametrize("label", (*LABELS, *NO_LABELS))
def test_both_read_a_name_alike(label):
    dev = pytest.importorskip("bench.harness.dev").moe_ops_dev
    how = parse_format(label)
    wanted = None
    if how is not None:
        group = how.group_size or how.row.group
        dtype = dtype_name(how.scale_type)
        wanted = (how.name, group, dtype, how.zero_points, how.multiple, how.has_kernels)
    assert dev.weight_format(label) == wanted


def table() -> list[str]:
    """The table of docs/quantization.md; `python -m tests.quant.test_formats` prints it."""
    lines = ["| name | stored | scales | a weight is | zero points | on the CPU |"]
    lines.append("|---|---|---|---|---|---|")
    for name, r in FORMATS.items():
        size = {8: "D", 4: "D/2", 6: "3D/4"}[r.bits]
        groups = (f"{r.head} + " if r.head else "") + f"D/{r.group or 'G'}"
        outputs = "O" if r.rows == 1 else f"O/{r.rows}"
        shape = ", ".join([outputs, groups, *([str(r.record)] if r.record else [])])
        also = ", or float32 [O]" if r.row_scales else ""
        dtype = "float32, bfloat16 or float16" if r.scales == "float" else r.scales
        stored = f"{dtype_name(r.dtype)} [O, {size}], {r.layout}"
        zeros = "uint8, or 8" if r.zeros else ""
        cells = (f"`{name}`", stored, f"{dtype} [{shape}]{also}", r.codec, zeros, r.kernels)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_documents_have_the_table():
    text = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    assert "\n".join(table()) in text


def test_the_walk_to_the_op_is_one_of_files():
    root = Path(__file__).parents[2]
    text = (root / "docs" / "quantization.md").read_text()
    walk = text.split("## From a checkpoint to the op")[1].split("\n## ")[0]
    files = re.findall(r"^\| `(.*?)`", walk, re.MULTILINE)
    assert len(files) == 10
    assert all((root / file).is_file() for file in files)


if __name__ == "__main__":
    print("\n".join(table()))

"""Quantized weights in the formulas beside the reference: bitwise identical results in every
format."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.nearness import WithoutHost
from tests.helpers.quantized import any_format

from moe_ops.formulas import codes
from moe_ops.reference import _codes, quantize_fp8
from moe_ops.reference.quantize_fp8 import dequantize_rows
from moe_ops.testing import assert_identical, short

FORMATS = (
    "int8",
    "int8 g32 float16",
    "int4 g64",
    "int4 g64 bfloat16 zero",
    "int4 g32 float16",
    "int4 g96 zero",
    "int4 g256",
    "mxfp4",
    "fp8",
    "e4m3",
    "e4m3 g32 bfloat16",
    "q4_k",
    "q6_k",
    "nvfp4",
)
DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)


def stored(kind: str, experts: int = 2, features: int = 5) -> dict[str, torch.Tensor]:
    """Returns the codes, the scales and the zero points of random weights."""
    parts = any_format(kind, experts, features, 288 if "96" in kind else 768)
    return {name.strip("_") or "w": t for name, t in parts.items()} | {"format": kind}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: "scales" if d is None else short(d))
@pytest.mark.parametrize("kind", FORMATS)
def test_dequantized(kind, dtype):
    call = stored(kind)
    with WithoutHost():
        got = codes.dequantized(**call, dtype=dtype)
    # Rounded once, where the reference computes in the narrow type.
    if dtype is None:
        floating = call["scale"].is_floating_point()
        dtype = call["scale"].dtype if floating else torch.float32
    exact = torch.promote_types(dtype, torch.float32)
    assert_identical(got, _codes.dequantized(**call, dtype=exact).to(dtype))
    one = {n: t if n == "format" else t[0] for n, t in call.items()}
    assert_identical(codes.dequantized(**one, dtype=dtype), got[0])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)])
def test_nothing(kind, sizes):
    call = stored(kind, *sizes)
    got, want = codes.dequantized(**call), _codes.dequantized(**call)
    assert got.shape == want.shape and got.dtype == want.dtype


def test_every_code_of_mxfp4_with_every_scale():
    w = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(256, 1)  # Groups of 32 codes.
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)[:, None]
    for dtype in (torch.float32, torch.float64):
        how = {"format": "mxfp4", "dtype": dtype}
        got = codes.dequantized(w, scale, **how)
        assert_identical(got, _codes.dequantized(w, scale, **how))
    assert bool(got[-16:].isnan().all()) and bool(got[:-16].isfinite().all())


def test_every_code_of_nvfp4_with_every_scale():
    w = torch.arange(256, dtype=torch.uint8).view(32, 8).repeat(256, 1)  # Groups of 16 codes.
    head = torch.tensor([0.75]).view(torch.uint8).expand(256 * 32, 4)
    steps = torch.arange(256, dtype=torch.uint8).repeat_interleave(32)[:, None]
    scale = torch.cat((head, steps), -1)
    for dtype in (torch.float32, torch.float64):
        how = {"format": "nvfp4", "dtype": dtype}
        got = codes.dequantized(w, scale, **how)
        assert_identical(got, _codes.dequantized(w, scale, **how))
    nan = (steps & 127)[:, 0] == 127
    assert bool(got[nan].isnan().all()) and bool(got[~nan].isfinite().all())


@pytest.mark.parametrize("depth", [128, 300, 1, 0])
def test_rows_of_fp8(depth):
    q, scale = quantize_fp8(torch.randn(3, depth))
    assert_identical(codes.dequantized_rows(q, scale), dequantize_rows(q, scale))

"""Tests of which algorithm, operand and work items a product gets on the CPU, by the rows of an
expert.

Asked for any target that the build has and any maker of processors, whatever this machine is
(csrc/cpu/gemm/heuristics.cpp; csrc/cpu/NOTES.md says why)."""

from __future__ import annotations

import itertools
import re

import pytest
from tests.helpers.dev import moe_ops_dev

from moe_ops._library import supported_isas

ISAS = supported_isas()
CODES = (
    *("int8", "int8_groups", "int4", "mxfp4", "nvfp4", "fp8", "e4m3", "codes", "turned_codes"),
)
LAYOUTS = ("dense_k", "dense_features", "packed", *CODES)
OTHERS, INTEL = False, True


def config(isa, intel, dtype, layout, rows, features=768, in_features=2048, **options):
    if isa not in ISAS:
        pytest.skip(f"this machine or build has no {isa}")
    return moe_ops_dev.cpu_gemm_config(
        dtype, layout, rows, features, in_features, isa, intel, **options
    )


@pytest.mark.parametrize(
    ("isa", "intel", "dtype", "layout", "rows", "expected"),
    [
        # A token or two: weights are read once, in four streams.
        ("avx512", OTHERS, "float32", "dense_k", 1, "gemv wide, items of 128 x 1024"),
        ("avx2", OTHERS, "float32", "dense_k", 1, "gemv wide, items of 128 x 1024"),
        ("avx512_bf16", INTEL, "bfloat16", "dense_k", 2, "gemv wide, items of 128 x 1024"),
        # Two passes of GEMV on Intel's; one pass of the blocked form elsewhere.
        ("avx512", INTEL, "float32", "dense_k", 6, "gemv wide, items of 128 x 252"),
        ("avx512", OTHERS, "float32", "dense_k", 6, "gemv_blocked wide, items of 128 x 1024"),
        # More rows, bfloat16 as pairs at full speed, widened on Intel's.
        (
            "avx512_bf16",
            OTHERS,
            "bfloat16",
            "dense_k",
            16,
            "gemv_blocked bf16, items of 128 x 1024",
        ),
        ("avx512_bf16", INTEL, "bfloat16", "dense_k", 16, "gemv_blocked wide, items of 128 x 1024"),
        # Many rows: transposing the weights is cheap beside the products.
        ("avx512_bf16", OTHERS, "bfloat16", "dense_k", 512, "pack_bt bf16, items of 128 x 1024"),
        ("avx512", INTEL, "float32", "dense_k", 32, "pack_bt wide, items of 128 x 1024"),
        ("avx2", OTHERS, "float64", "dense_k", 512, "pack_bt wide, items of 128 x 1024"),
        # Weights dense along the features, as in backward.
        ("avx512", INTEL, "float32", "dense_features", 8, "outer wide, items of 128 x 1024"),
        ("avx512", OTHERS, "float32", "dense_features", 8, "row_major_b wide, items of 128 x 1024"),
        (
            "avx512_bf16",
            OTHERS,
            "bfloat16",
            "dense_features",
            64,
            "row_major_b bf16, items of 128 x 512",
        ),
        # Packed ahead of time: streams up to 5 rows (Intel's: 3), then items of many features.
        ("avx512", OTHERS, "float32", "packed", 5, "packed_b wide, items of 128 x 1024"),
        ("avx512", INTEL, "float32", "packed", 5, "packed_b wide, items of 128 x 4096"),
        ("avx512_bf16", INTEL, "bfloat16", "packed", 8, "packed_b bf16, items of 128 x 4096"),
        ("avx512_bf16", INTEL, "bfloat16", "packed", 9, "packed_b wide, items of 128 x 4096"),
        # Few bits: tokens become integers of 16 or 8 bits.
        ("avx512_bf16", OTHERS, "bfloat16", "int8", 1, "gemv int16, items of 128 x 2048"),
        ("avx512_bf16", OTHERS, "bfloat16", "int8", 64, "repack_b int8, items of 128 x 2048"),
        ("avx512_bf16", OTHERS, "float32", "int8", 64, "repack_b wide, items of 128 x 256"),
        ("avx512_bf16", OTHERS, "bfloat16", "int4", 4, "gemv int8, items of 128 x 2048"),
        ("avx2", OTHERS, "bfloat16", "int4", 64, "repack_b int8, items of 128 x 2048"),
        ("avx2", OTHERS, "float32", "int4", 64, "repack_b two_int8, items of 128 x 2048"),
        ("avx512_bf16", OTHERS, "bfloat16", "mxfp4", 4, "gemv int8, items of 128 x 2048"),
        ("avx512", OTHERS, "float32", "mxfp4", 64, "repack_b two_int8, items of 128 x 2048"),
        ("avx512", OTHERS, "bfloat16", "nvfp4", 8, "gemv int8, items of 128 x 2048"),
        ("avx512_bf16", OTHERS, "bfloat16", "nvfp4", 64, "dequant bf16, items of 128 x 512"),
        ("avx2", OTHERS, "bfloat16", "nvfp4", 64, "dequant wide, items of 128 x 512"),
        ("avx512_bf16", OTHERS, "bfloat16", "fp8", 4, "gemv fp8_bf16, items of 128 x 2048"),
        ("avx512", OTHERS, "bfloat16", "fp8", 4, "gemv fp8, items of 128 x 2048"),
        ("avx512_bf16", OTHERS, "bfloat16", "fp8", 5, "pack_tokens fp8_bf16, items of 128 x 256"),
        ("avx2", OTHERS, "bfloat16", "fp8", 5, "pack_tokens fp8, items of 128 x 256"),
        ("avx512_bf16", OTHERS, "bfloat16", "int8_groups", 4, "gemv int16, items of 128 x 2048"),
        (
            "avx512_bf16",
            OTHERS,
            "bfloat16",
            "int8_groups",
            64,
            "repack_b int8, items of 128 x 2048",
        ),
        ("avx2", OTHERS, "bfloat16", "int8_groups", 64, "repack_b int16, items of 128 x 2048"),
        ("avx2", OTHERS, "float32", "int8_groups", 64, "dequant wide, items of 128 x 512"),
        ("avx512_bf16", INTEL, "bfloat16", "e4m3", 8, "gemv fp8_bf16, items of 128 x 2048"),
        ("amx", INTEL, "bfloat16", "e4m3", 4, "gemv fp8_bf16, items of 128 x 2048"),
        ("amx", INTEL, "bfloat16", "e4m3", 5, "dequant amx, items of 128 x 512"),
        ("avx512_bf16", OTHERS, "bfloat16", "e4m3", 64, "dequant bf16, items of 128 x 512"),
        ("avx512_bf16", OTHERS, "float32", "e4m3", 4, "gemv decoded, items of 128 x 2048"),
        # Other formats of few bits: tokens of one pass stay as they are.
        ("avx512", OTHERS, "bfloat16", "codes", 4, "gemv decoded, items of 128 x 2048"),
        ("avx512", OTHERS, "bfloat16", "codes", 5, "dequant wide, items of 128 x 512"),
        ("avx2", OTHERS, "float32", "codes", 2, "gemv decoded, items of 128 x 2048"),
        ("avx2", OTHERS, "float32", "turned_codes", 1, "dequant wide, items of 128 x 512"),
        # AMX takes three rows and more.
        ("amx", INTEL, "bfloat16", "dense_k", 2, "gemv wide, items of 128 x 1024"),
        ("amx", INTEL, "bfloat16", "dense_k", 3, "pack_tokens amx, items of 96 x 2048"),
        ("amx", INTEL, "bfloat16", "dense_features", 16, "row_major_b amx, items of 128 x 512"),
        ("amx", INTEL, "bfloat16", "packed", 64, "packed_b amx, items of 128 x 2048"),
    ],
)
def test_known_shapes(isa, intel, dtype, layout, rows, expected):
    assert config(isa, intel, dtype, layout, rows) == expected


def test_shallow_products_leave_the_blocked_form_early():
    # It ends a product with a sum of lanes for each feature and row, whatever the depth.
    assert config("avx512", OTHERS, "float32", "dense_k", 16).startswith("gemv_blocked")
    shallow = config("avx512", OTHERS, "float32", "dense_k", 16, in_features=64)
    assert shallow.startswith("pack_bt")


def test_a_copy_of_small_weights_serves_many_rows():
    assert config("avx512", OTHERS, "float32", "dense_k", 512, 256, 64) == (
        "pack_bt wide, items of 1024 x 1024"
    )


@pytest.mark.parametrize(
    ("rows", "features", "width"),
    [(1, 4096, 4096), (1, 6144, 6144), (1, 6145, 1024), (2, 3072, 3072), (2, 4096, 1024)],
)
def test_rows_of_weights_are_read_whole_where_their_sums_fit(rows, features, width):
    name = config("avx512", OTHERS, "bfloat16", "dense_features", rows, features)
    assert name == f"outer wide, items of 128 x {width}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("intel", [OTHERS, INTEL])
def test_batch_invariant_algorithms_add_in_one_order(isa, intel):
    """By layout, what a count of rows may choose between (NOTES.md, Threads and determinism)."""
    may = {
        "dense_k": {"gemv", "gemv_blocked"},
        "dense_features": {"outer", "row_major_b"},
        "packed": {"packed_b"},
        "int8": {"gemv"},
        "int8_groups": {"dequant"},
        "e4m3": {"dequant"},
        "int4": {"gemv"},
        "fp8": {"gemv", "gemv_blocked"},
        "mxfp4": {"dequant"},
        "nvfp4": {"dequant"},
        "codes": {"dequant"},
        "turned_codes": {"dequant"},
    }
    for dtype, layout in itertools.product(("float32", "bfloat16", "float16"), LAYOUTS):
        words = [
            config(isa, intel, dtype, layout, rows, invariant=True).split(",")[0].split()
            for rows in (1, 2, 4, 5, 8, 9, 64, 1000)
        ]
        assert {algorithm for algorithm, _ in words} <= may[layout]
        assert len({operand for _, operand in words}) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_every_size_gets_items(isa):
    sizes = itertools.product(
        ("float64", "float32", "bfloat16", "float16"),
        LAYOUTS,
        (1, 3, 17, 2**20),
        (1, 70, 2**17),
        (0, 1, 33, 4096),
    )
    for dtype, layout, rows, features, in_features in sizes:
        if dtype == "float64" and layout in CODES:
            continue
        words = config(isa, OTHERS, dtype, layout, rows, features, in_features)
        found = re.fullmatch(r"(\w+) \w+, items of (\d+) x (\d+)", words)
        assert found and int(found[2]) > 0 and int(found[3]) > 0
        assert (found[1] == "zero") == (in_features == 0)


def test_unknown_layout():
    with pytest.raises(ValueError, match=r"layout must be known, got dense\."):
        moe_ops_dev.cpu_gemm_config("float32", "dense", 1, 1, 1, ISAS[0], False)

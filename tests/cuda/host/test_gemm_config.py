"""Tests of which tile a product, or a stage of moe_ffn, gets on a card; asked without one (choose.h
in csrc/cuda/grouped_gemm and csrc/cuda/moe_ffn)."""

from __future__ import annotations

import itertools

import pytest
from tests.helpers.dev import moe_ops_dev

ffn_config, gemm_config = moe_ops_dev.ffn_config, moe_ops_dev.gemm_config

LARGE = "128x256x64 cooperative cluster 2"
LARGE_ALONE = "128x256x64 cooperative cluster 1"
MIDDLE = "128x128x64 ping-pong cluster 1"
FEW_ROWS = "64x128x64 ping-pong cluster 1"
TINY = "64x64x128 cooperative cluster 1"
OF_PRODUCT = {
    "nt": {LARGE, MIDDLE, FEW_ROWS, TINY},
    "nn": {LARGE, MIDDLE, FEW_ROWS, TINY},
    "tn": {LARGE, MIDDLE},
    "gather_nt": {MIDDLE, FEW_ROWS, TINY},
    "gather_tn": {LARGE, MIDDLE},
    "tn_gather": {LARGE_ALONE, MIDDLE},
    "gather_tn_gather": {MIDDLE},
}


@pytest.mark.parametrize(
    ("product", "rows", "experts", "m", "n", "k", "expected"),
    [
        # Mixtral up and down, 4096 and 32768 tokens: long sums, full tiles.
        ("nt", 8192, 8, 0, 28672, 4096, LARGE),
        ("nn", 65536, 8, 0, 4096, 28672, LARGE),
        ("tn", 65536, 8, 28672, 4096, 0, LARGE),
        # Qwen3-30B-A3B: 64 rows per expert, then the weights are what is read.
        ("nt", 8192, 128, 0, 1536, 2048, FEW_ROWS),
        # 128 rows an expert would leave half of a cluster idle.
        ("nt", 8192, 64, 0, 2048, 2048, MIDDLE),
        # One token: 8 experts times 8 columns of tiles would fill half of the SMs.
        ("nt", 8, 32, 0, 1024, 1024, TINY),
        # Qwen3-30B-A3B down, 8192 tokens. A tile of 128x128 waits for L2 longer than its products
        # take (19.7 against 11.1 cycles a step of k), 128x256 does not (19.7 against 20.0), and so
        # is worth an end that nothing hides even after a short sum.
        ("nt", 65536, 128, 0, 2048, 768, LARGE),
        # Sums so short that it is not.
        ("nt", 65536, 8, 0, 2048, 128, MIDDLE),
        # Small weight gradients: more tiles than 128x256 would give.
        ("tn", 4096, 8, 256, 256, 0, MIDDLE),
        # Those of moe_ffn, 32768 tokens: Qwen3-30B-A3B, DeepSeek-V3.
        ("gather_tn", 262144, 128, 2048, 768, 0, LARGE),
        ("tn_gather", 262144, 128, 1536, 2048, 0, LARGE_ALONE),
        ("tn_gather", 262144, 256, 4096, 7168, 0, LARGE_ALONE),
        # 32 rows per expert: what is written counts, and its end should be hidden.
        ("gather_tn", 4096, 128, 2048, 768, 0, MIDDLE),
        ("tn_gather", 4096, 128, 1536, 2048, 0, MIDDLE),
    ],
)
def test_known_shapes(product, rows, experts, m, n, k, expected):
    assert gemm_config(product, rows, experts, m, n, k) == expected


SIZES = (0, 1, 7, 64, 1000, 2**20)


@pytest.mark.parametrize("product", OF_PRODUCT)
def test_every_size_gets_a_tile_of_its_product(product):
    for rows, experts, n, k in itertools.product(SIZES, (1, 8, 1024), (8, 520, 2**17), (8, 4096)):
        assert gemm_config(product, rows, experts, n, n, k) in OF_PRODUCT[product]


def test_rows_of_a_tile_grow_with_those_of_an_expert():
    tall = [
        int(gemm_config("nt", 64 * rows, 64, 0, 4096, 4096).split("x")[0])
        for rows in (1, 16, 64, 128, 512, 4096)
    ]
    assert tall == sorted(tall)
    assert (tall[0], tall[-1]) == (64, 128)


def test_a_cluster_needs_two_sms():
    assert gemm_config("nt", 65536, 8, 0, 28672, 4096, num_sms=1) != LARGE


def test_unknown_product():
    with pytest.raises(ValueError, match=r"product must be nt, nn, tn, or .* got tt\."):
        gemm_config("tt", 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("rows", "up", "down_bwd"),
    # Where the weights are what is read any tile will do. 65 rows fill a tile of 128 better than
    # two of 64; above 128, two row tiles share the weights, which L2 could not bring twice.
    [
        (1, "low", "low"),
        (64, "low", "low"),
        (65, "high", "high"),
        (128, "high", "high"),
        (129, "pair", "high"),
        (4096, "pair", "high"),
    ],
)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(2048, 768), (4096, 14336)])
def test_stages_of_moe_ffn(hidden_size, intermediate_size, rows, up, down_bwd):
    assert ffn_config("up", 64 * rows, 64, 2 * intermediate_size, hidden_size) == up
    assert ffn_config("down_bwd", 64 * rows, 64, intermediate_size, hidden_size) == down_bwd


def test_unknown_stage():
    with pytest.raises(ValueError, match=r"stage must be up or down_bwd, got down\."):
        ffn_config("down", 1, 1, 1, 1)


@pytest.mark.parametrize("product", ["nt", "nn", "gather_nt", "gather_nn"])
def test_in_the_batch_invariant_mode_rows_do_not_choose(product):
    for n, k in ((8, 64), (520, 4096), (2**17, 768)):
        tiles = {gemm_config(product, r, 64, 0, n, k, invariant=True) for r in SIZES}
        assert tiles == {MIDDLE if product.startswith("gather") else LARGE}
        assert gemm_config(product, 1, 64, 0, 520, 4096) not in tiles  # without it they do


@pytest.mark.parametrize(("stage", "tile"), [("up", "pair"), ("down_bwd", "high")])
def test_nor_do_they_choose_the_tile_of_a_stage(stage, tile):
    assert {ffn_config(stage, r, 64, 1536, 2048, invariant=True) for r in SIZES} == {tile}
    assert ffn_config(stage, 64, 64, 1536, 2048) != tile


def test_gradients_of_weights_sum_over_the_batch_in_any_mode():
    assert gemm_config("tn", 65536, 8, 28672, 4096, 0, invariant=True) == LARGE

"""The fp8 block on the simulator: schedules, gathered rows, bytes."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.fp8 import check_moe_ffn_fp8, fp8_operands
from tests.helpers.routing import Routing

import moe_ops
from moe_ops.testing import assert_identical, short

TILES = ("2x128x256", "128x256", "64x128")
LARGE = TILES[:2]
kernels = pytest.mark.parametrize("tile", (*TILES, "generic"))


@pytest.fixture(autouse=True)
def chosen_tile(request, monkeypatch):
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", params.get("tile", "128x256"))


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", ["skewed", "dropped", "out_of_range"])
@kernels
def test_values(simulator, tile, kind, on_input):
    call = fp8_operands(Routing(70, 5, 2, kind), 272, 144, torch.bfloat16, bias=True)
    call["apply_router_weight_on_input"] = on_input
    counted = simulator.counted(lambda: check_moe_ffn_fp8(call, row_steps=1), "wgmma")
    assert (counted["wgmma"] > 0) == (tile != "generic")
    assert simulator.warnings() == ""


@kernels
def test_schedules(simulator, tile):
    call = fp8_operands(Routing(90, 4, 2, "dropped"), 400, 144, torch.bfloat16, bias=True)
    with simulator.options(sms=2):
        simulator.check_schedules(lambda: moe_ops.moe_ffn_fp8(**call))


# --- activation in the epilogue of the up product


KINDS = ("uniform", "skewed", "dropped", "out_of_range", "one_expert")
# Every routing in bfloat16; the other types, which only the result has, with one of them.
FUSED = [
    pytest.param(
        dtype,
        kind,
        bias_on_input,
        marks=() if dtype == torch.bfloat16 or kind == "dropped" else pytest.mark.full,
        id=f"{short(dtype)}-{kind}-{'bias-input' if bias_on_input else 'plain'}",
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for kind in KINDS
    for bias_on_input in (False, True)
]


@pytest.mark.parametrize(("dtype", "kind", "bias_on_input"), FUSED)
def test_values_of_the_fused_product(simulator, monkeypatch, dtype, kind, bias_on_input):
    call = fp8_operands(Routing(150, 3, 2, kind), 272, 256, dtype, bias=bias_on_input)
    call["apply_router_weight_on_input"] = bias_on_input
    stored, results = {}, {}
    for tile in ("64x128", *LARGE):
        monkeypatch.setenv("MOE_OPS_GEMM_TILE", tile)

        def check(tile=tile):
            results[tile] = check_moe_ffn_fp8(call, row_steps=1)

        stored[tile] = simulator.counted(check, "st_bytes")["st_bytes"]
    rows = int(call["topk_ids"].lt(3).logical_and(call["topk_ids"] >= 0).sum())
    # The pre-activation, and what the large tiles store in boxes: h, rows of 16 bits.
    boxed = 256 + (0 if dtype == torch.float32 else 2 * 272)
    for fused in LARGE:
        # The simulator sums products in the order of k: bitwise identical results in both.
        assert_identical(results[fused], results["64x128"])
        assert stored["64x128"] - stored[fused] == rows * (2 * 256 * 4 + boxed)
    assert simulator.warnings() == ""


@pytest.mark.parametrize("tile", LARGE)
def test_schedules_of_the_fused_product(simulator, tile):
    """A block takes three tiles and goes round the ring of stages nearly four times."""
    call = fp8_operands(Routing(200, 3, 2, "dropped"), 528, 256, torch.bfloat16, bias=True)
    with simulator.options(sms=2):
        simulator.check_schedules(lambda: moe_ops.moe_ffn_fp8(**call))


def test_a_token_that_is_not_finite_in_the_fused_product(simulator):
    call = fp8_operands(Routing(150, 3, 2), 272, 128, torch.bfloat16)
    want = moe_ops.moe_ffn_fp8(**call)
    call["x"][2, 70] = torch.nan
    y = moe_ops.moe_ffn_fp8(**call)
    assert y[2].isnan().all()
    others = torch.arange(len(y)) != 2
    assert_identical(y[others], want[others])


@pytest.mark.parametrize(
    ("change", "sizes"),
    [
        ({"activation": "geglu"}, (272, 128)),
        ({"interleaved": True}, (272, 128)),
        ({}, (272, 192)),
        ({}, (264, 128)),
    ],
    ids=["activation", "interleaved", "I", "H"],
)
def test_others_take_two_launches(simulator, change, sizes):
    call = fp8_operands(Routing(150, 3, 2), *sizes, torch.bfloat16) | change
    counted = simulator.counted(lambda: check_moe_ffn_fp8(call, row_steps=1), "st_bytes")
    assert counted["st_bytes"] > 300 * 2 * sizes[1] * 4


# --- bytes


@pytest.mark.parametrize("tile", TILES)
def test_bytes(simulator, tile):
    """csrc/cuda/grouped_gemm_fp8/NOTES.md has the formulas. Rows of x are read as they are needed:
    nothing is stored that has the size of x by rows."""
    t, h, i, n = 48, 1024, 128, 96
    call = fp8_operands(Routing(t, 4, 2), h, i, torch.bfloat16)
    counted = simulator.counted(
        lambda: moe_ops.moe_ffn_fp8(**call), "ld_bytes", "st_bytes", "tma_ld_bytes", "tma_st_bytes"
    )
    experts = torch.bincount(call["topk_ids"].flatten().long(), minlength=4).tolist()
    # The large tiles: both products of this block, activation in the first one's epilogue.
    large = tile in LARGE
    preact = 0 if large else n * 2 * i * 4
    stored = (
        4 * (5 + 2 * n)  # offsets and maps
        + t * (h + 4 * h // 128)  # x in e4m3
        + preact
        + n * 4 * i // 128  # scales of h
        + (0 if large else n * (i + h * 2))  # h in e4m3, and by rows
        + t * h * 2  # the result
    )
    assert counted["st_bytes"] == stored
    boxes = sum(-(-m // 16) for m in experts) * (i // 128 + h // 64)
    assert counted["tma_st_bytes"] == (boxes * 16 * 128 if large else 0)

    rows, columns, box, cluster = {
        "2x128x256": (128, 256, 64, 2),
        "128x256": (128, 256, 64, 1),
        "64x128": (64, 128, 16, 1),
    }[tile]
    tiles = sum(-(-m // (rows * cluster)) for m in experts)
    steps = h // 128

    def weights(column_tiles: int) -> int:
        """Tiles of a stage of weights. A row tile without a partner is split by columns."""
        pairs, single = zip(*(divmod(-(-m // rows), cluster) for m in experts), strict=True)
        return sum(pairs) * column_tiles + sum(single) * -(-column_tiles // cluster) * cluster

    a_boxes = sum(-(-m // box) * box for m in experts)
    assert counted["tma_ld_bytes"] == (
        weights(2 * i // columns) * columns * steps * 128
        + weights(h // columns) * columns * i
        + h // columns * a_boxes * i
    )

    # Rows of x are gathered once for each column tile: two of 128, or one of 256. x, the
    # pre-activation and rows are read once. A consumer's thread reads at most two scales of a and
    # one or two of b a stage, and the last stage's twice; indices are what is left.
    up_columns = 2 * i // columns
    read = up_columns * n * h + t * h * 2 + preact + n * h * 2
    stages = up_columns * (steps + 1) + h // columns * (i // 128 + 1)
    scales = 4 * tiles * cluster * stages * ((2 + 2) * 256 if large else (2 + 1) * 128)
    assert read < counted["ld_bytes"] < 1.4 * read + scales

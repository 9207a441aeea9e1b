"""The fp8 products on the simulator: every kernel, values, bytes, schedules, mutants."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.helpers.fp8 import (
    check_grouped_gemm_fp8,
    check_grouped_gemm_fp8_wgrad,
    fp8_gemm_operands,
    fp8_wgrad_operands,
)
from tests.helpers.simulator import noticed_mutants

import moe_ops
from moe_ops.testing import assert_identical, short

TILES = ("2x128x256", "128x256", "64x128")
KERNELS = (*TILES, "generic")
kernels = pytest.mark.parametrize("tile", KERNELS)
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Experts that end inside a tile, on its edge and just after it, empty ones at every place; O a
# multiple of 8 and K of 16, and of nothing else.
SHAPES = {
    "edges": ((0, 1, 128, 0, 129, 63, 64, 0), 144, 136),
    "small": ((1, 2, 3), 16, 8),
    "wide": ((70, 200), 48, 264),
    "long": ((5, 0, 66), 1296, 72),
    "skewed": ((0, 400, *[1] * 9), 272, 136),
    "one": ((257,), 128, 128),
    "none": ((0, 0), 128, 128),
}


@pytest.fixture(autouse=True)
def chosen_tile(request, monkeypatch):
    tile = request.node.callspec.params.get("tile") if hasattr(request.node, "callspec") else None
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", tile or "128x256")


def poisoned_tail(call):
    """Rows of no expert are NaN: they may not reach a result."""
    end = int(call["expert_offsets"][-1])
    call["a"][end:] = torch.nan
    call["a_scale"][end:] = torch.nan
    return call


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES)
@kernels
def test_values(simulator, tile, shape, dtype):
    counts, k, o = SHAPES[shape]
    call = poisoned_tail(fp8_gemm_operands(counts, k, o, tail=3, bias=dtype))
    if dtype == torch.float16:
        call["a_scale"] *= 1e-2
    counted = simulator.counted(lambda: check_grouped_gemm_fp8(call, dtype), "wgmma")
    assert (counted["wgmma"] > 0) == (tile != "generic" and shape != "none"), "another kernel ran"
    assert simulator.warnings() == ""


@kernels
def test_schedules(simulator, tile):
    """A block takes three tiles or more and goes round the ring of stages about twice."""
    rows = 64 if tile == "64x128" else 128
    call = fp8_gemm_operands((rows + 1, 0, 3, 2 * rows, 70), 528, 264, tail=3, bias=torch.float32)
    with simulator.options(sms=4):
        simulator.check_schedules(lambda: moe_ops.grouped_gemm_fp8(**call))


def test_schedules_of_unaligned_rows(simulator):
    call = fp8_gemm_operands((5, 0, 70), 391, 151, tail=3, bias=torch.bfloat16)
    with simulator.options(sms=2):
        simulator.check_schedules(lambda: moe_ops.grouped_gemm_fp8(**call))


@pytest.mark.parametrize("tile", TILES)
def test_bytes(simulator, tile):
    """csrc/cuda/grouped_gemm_fp8/NOTES.md has the formula: A once per column tile, in boxes that
    hold rows of the expert; B once per row tile, or once a pair of them; the result once, in boxes
    where the tile is large."""
    rows, columns, box, cluster = {
        "2x128x256": (128, 256, 64, 2),
        "128x256": (128, 256, 64, 1),
        "64x128": (64, 128, 16, 1),
    }[tile]
    counts, k, o, tail = (rows + 1, 0, 3, 2 * rows, 70), 272, 264, 3
    call = fp8_gemm_operands(counts, k, o, tail=tail)
    counted = simulator.counted(
        lambda: moe_ops.grouped_gemm_fp8(**call), "tma_ld_bytes", "st_bytes", "tma_st_bytes"
    )
    column_tiles, steps = -(-o // columns), 3
    a_bytes = sum(column_tiles * steps * -(-m // box) * box * 128 for m in counts)
    b_bytes = sum(column_tiles * steps * -(-m // (rows * cluster)) * columns * 128 for m in counts)
    assert counted["tma_ld_bytes"] == a_bytes + b_bytes
    boxed = rows == 128
    boxes = sum(-(-m // 16) for m in (*counts, tail)) * -(-o // 64)
    assert counted["st_bytes"] == (0 if boxed else (sum(counts) + tail) * o * 2)
    assert counted["tma_st_bytes"] == (boxes * 16 * 128 if boxed else 0)


@pytest.mark.parametrize("tile", TILES)
def test_bits_of_the_generic_kernel(simulator, monkeypatch, tile):
    """With one product a block there is one order of sums: scales and bias enter in the same."""
    call = fp8_gemm_operands((70, 3, 130), 640, 264, bias=torch.float32)
    keep = torch.zeros(640, dtype=torch.bool)
    keep[::128] = True
    call["a"] = torch.where(keep, call["a"].float(), 0).to(call["a"].dtype)
    got = moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32)
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", "generic")
    assert_identical(got, moe_ops.grouped_gemm_fp8(**call, out_dtype=torch.float32))


@pytest.mark.parametrize("tile", TILES)
def test_nan_stays_where_it_belongs(simulator, tile):
    """Codes and scales of NaN, in rows and columns that share tiles with others."""
    call = fp8_gemm_operands((70, 65), 272, 264, tail=3)
    clean = moe_ops.grouped_gemm_fp8(**call)
    call["a"][3, 130] = torch.nan
    call["a_scale"][71, 2] = torch.nan
    call["b"][0, 200, 270] = torch.nan
    call["b_scale"][1, 2, 0] = torch.nan
    out = moe_ops.grouped_gemm_fp8(**poisoned_tail(call))
    where = torch.zeros(138, 264, dtype=torch.bool)
    where[[3, 71]] = True
    where[:70, 200] = True
    where[70:135, 256:] = True
    assert_identical(out.isnan(), where)
    assert_identical(out[~where], clean[~where])
    assert bool((out[135:] == 0).all())


def test_many_experts(simulator):
    """More than the 128 experts that a warp scans at once."""
    for counts in ((*[0] * 300, 5), (3, *[0] * 140, 200, *[0] * 9), [i % 3 for i in range(260)]):
        check_grouped_gemm_fp8(fp8_gemm_operands(counts, 32, 72))


@kernels
@pytest.mark.parametrize(
    "offsets", [[0, 4, 7, 13], [0, 8, 7, 12], [1, 4, 7, 12], [0, -4, 7, 12], [0, 4, 7, 2**31 - 1]]
)
def test_offsets_out_of_order_stay_inside_the_rows(simulator, tile, offsets):
    """A device cannot refuse what it reads; every access outside a tensor would be reported."""
    call = fp8_gemm_operands((4, 3, 5), 144, 16)
    moe_ops.grouped_gemm_fp8(**{**call, "expert_offsets": torch.tensor(offsets).int()})


VIEWS = {
    "rows": lambda t: torch.cat([t, t], -1)[..., : t.size(-1)],  # strides of 16 bytes
    "odd_rows": lambda t: torch.nn.functional.pad(t, (0, 1))[..., : t.size(-1)],
    "odd_start": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["a", "b"])
def test_strides_and_alignment(simulator, name, view):
    """The generic kernel computes what TMA cannot read."""
    call = fp8_gemm_operands((5, 0, 70), 144, 72)
    call[name] = VIEWS[view](call[name])
    counted = simulator.counted(lambda: check_grouped_gemm_fp8(call), "wgmma")
    assert (counted["wgmma"] > 0) == (view == "rows")


@pytest.mark.parametrize(("k", "o"), [(136, 64), (128, 60), (8, 64)])
def test_odd_sizes_go_to_the_generic_kernel(simulator, k, o):
    call = fp8_gemm_operands((5, 0, 70), k, o)
    assert simulator.counted(lambda: check_grouped_gemm_fp8(call), "wgmma")["wgmma"] == 0


@pytest.mark.parametrize(
    ("counts", "chosen"),
    [((3, 2, 1, 4), "64x128"), ((80, 60), "128x256"), ((250, 270), "2x128x256")],
)
def test_choice_of_the_tile(simulator, monkeypatch, counts, chosen):
    # Three column tiles: of an even number per row tile that has no partner costs a pair of blocks
    # no more than blocks alone.
    call = fp8_gemm_operands(counts, 256, 520)
    seen = {}
    for tile in ("", *TILES):
        monkeypatch.setenv("MOE_OPS_GEMM_TILE", tile)
        seen[tile] = simulator.counted(
            lambda: moe_ops.grouped_gemm_fp8(**call), "wgmma", "tma_ld_bytes"
        )
    assert [tile for tile in TILES if seen[tile] == seen[""]] == [chosen]


# --- the weight gradient

# O and K that end inside a tile, and of nothing but K a multiple of 8.
WGRAD_SHAPES = {
    "edges": ((0, 1, 128, 0, 129, 63, 0), 136, 144),
    "small": ((1, 2, 3), 3, 8),
    "wide": ((70, 200), 300, 264),
    "long": ((5, 0, 1100), 40, 72),
    "none": ((0, 0), 128, 128),
}
WGRAD_TILES = ("sm90", "generic")
wgrad_tiles = pytest.mark.parametrize("tile", WGRAD_TILES)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=short)
@pytest.mark.parametrize("shape", WGRAD_SHAPES)
@wgrad_tiles
def test_wgrad_values(simulator, tile, shape, dtype):
    counts, o, k = WGRAD_SHAPES[shape]
    call = fp8_wgrad_operands(counts, o, k, tail=3)
    if dtype == torch.float16:
        call["a_scale"] *= 1e-3
    # Groups of no expert are NaN: they may not reach a result.
    offsets = call["expert_offsets"].tolist()
    used = torch.zeros(len(call["a_scale"]), dtype=torch.bool)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets)):
        used[begin // 128 + e :][: -(-(end - begin) // 128)] = True
    for name in ("grad", "a"):
        call[name].view(torch.uint8).unflatten(1, (-1, 128))[:, ~used] = 0x7F
        call[f"{name}_scale"][~used] = torch.nan
    counted = simulator.counted(lambda: check_grouped_gemm_fp8_wgrad(call, dtype), "wgmma")
    assert (counted["wgmma"] > 0) == (tile != "generic" and shape != "none"), "another kernel ran"
    main = torch.randn(len(counts), o, k).to(dtype)
    want = main.float() + moe_ops.grouped_gemm_fp8_wgrad(**call)
    moe_ops.grouped_gemm_fp8_wgrad(**call, main_grad=main)
    assert_identical(main, want.to(dtype))
    assert simulator.warnings() == ""


@wgrad_tiles
def test_wgrad_schedules(simulator, tile):
    """A block takes three tiles or more and goes round the ring of stages about twice."""
    call = fp8_wgrad_operands((700, 0, 3, 900), 264, 136)
    with simulator.options(sms=4):
        simulator.check_schedules(lambda: moe_ops.grouped_gemm_fp8_wgrad(**call))


def test_wgrad_bytes(simulator):
    """csrc/cuda/grouped_gemm_fp8/NOTES.md has the formula: grad once per column tile, in boxes of
    64 features; a once a pair of row tiles; the result once."""
    counts, o, k = (129, 0, 3, 256), 200, 264
    call = fp8_wgrad_operands(counts, o, k)
    counted = simulator.counted(
        lambda: moe_ops.grouped_gemm_fp8_wgrad(**call, out_dtype=torch.bfloat16),
        "tma_ld_bytes",
        "st_bytes",
        "tma_st_bytes",
    )
    steps = sum(-(-m // 128) for m in counts)
    column_tiles, pairs, boxes = 3, 1, 4
    grad_bytes = column_tiles * steps * boxes * 64 * 128
    a_bytes = pairs * column_tiles * steps * 128 * 128
    assert counted["tma_ld_bytes"] == grad_bytes + a_bytes
    assert counted["st_bytes"] == len(counts) * o * k * 2
    assert counted["tma_st_bytes"] == 0


def test_wgrad_bits_of_the_generic_kernel(simulator, monkeypatch):
    """With one product a group there is one order of sums: scales enter in the same."""
    call = fp8_wgrad_operands((300, 0, 70), 200, 136)
    keep = torch.zeros(call["a"].shape[1], dtype=torch.bool)
    keep[::128] = True
    call["a"] = torch.where(keep, call["a"].float(), 0).to(call["a"].dtype)
    got = moe_ops.grouped_gemm_fp8_wgrad(**call)
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", "generic")
    assert_identical(got, moe_ops.grouped_gemm_fp8_wgrad(**call))


@wgrad_tiles
@pytest.mark.parametrize(
    "offsets", [[0, 4, 7, 13], [0, 8, 7, 12], [1, 4, 7, 12], [0, -4, 7, 12], [0, 4, 7, 2**31 - 1]]
)
def test_wgrad_of_offsets_out_of_order_stays_inside(simulator, tile, offsets):
    call = fp8_wgrad_operands((4, 3, 5), 16, 24)
    moe_ops.grouped_gemm_fp8_wgrad(**{**call, "expert_offsets": torch.tensor(offsets).int()})


@pytest.mark.parametrize(("o", "k", "takes"), [(7, 24, True), (64, 60, False), (64, 7, False)])
def test_wgrad_sizes_that_go_to_the_generic_kernel(simulator, o, k, takes):
    call = fp8_wgrad_operands((5, 0, 70), o, k)
    counted = simulator.counted(lambda: check_grouped_gemm_fp8_wgrad(call), "wgmma")
    assert (counted["wgmma"] > 0) == takes


@pytest.mark.full
def test_mutants_are_noticed(simulator):
    """Waits, fences, arrivals, counts, coordinates and scales of the compiled kernels, broken one
    at a time (fp8_mutants.py)."""
    noticed = noticed_mutants("fp8_mutants")
    assert len(noticed) >= 20
    assert [name for name, how in noticed.items() if how is None] == []

"""The grouped GEMM kernels under every schedule, and with offsets that lead nowhere."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.simulator import noticed_mutants

import moe_ops
from moe_ops import reference
from moe_ops.testing import DTYPES, assert_close_by_norm, short


@pytest.fixture(autouse=True)
def generic_kernels(monkeypatch):
    """Not those of test_grouped_gemm_sm90.py."""
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", "generic")


def operands(counts, k, o, dtype, *, tail=3, layout="k"):
    """Operands of a product and its wgrad; layout "o": matrices dense along their features."""
    n, e = sum(counts) + tail, len(counts)
    b = torch.randn(e, o, k)
    if layout == "o":
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    return {
        "a": torch.randn(n, k).to(dtype),
        "b": b.to(dtype),
        "expert_offsets": torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        "bias": torch.randn(e, o).to(dtype),
        "grad": torch.randn(n, o).to(dtype),
    }


def products(a, b, expert_offsets, bias, grad):
    return (
        moe_ops.grouped_gemm(a, b, expert_offsets, bias=bias),
        moe_ops.grouped_gemm_wgrad(grad, a, expert_offsets),
        moe_ops.grouped_sum(grad, expert_offsets),
    )


def reference_products(a, b, expert_offsets, bias, grad):
    return (
        reference.grouped_gemm(a, b, expert_offsets, bias=bias),
        reference.grouped_gemm_wgrad(grad, a, expert_offsets),
        reference.grouped_sum(grad, expert_offsets),
    )


# Rows of 8 elements start on 16 bytes in every type, rows of 7 do not; many rows an expert take the
# large tile of the 16-bit types.
CASES = {
    "aligned": ((5, 0, 70), 72, 80, "k"),
    "unaligned": ((5, 0, 70), 71, 79, "k"),
    "transposed": ((5, 0, 70), 72, 80, "o"),
    "transposed-unaligned": ((3, 0, 66), 35, 41, "o"),
    "large": ((130, 0, 140), 136, 264, "k"),
    "large-transposed": ((130, 0, 140), 136, 264, "o"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", CASES)
def test_schedules(simulator, case, dtype):
    if case.startswith("large") and dtype.itemsize > 2:
        pytest.skip("Types of 32 and 64 bits have one tile.")
    counts, k, o, layout = CASES[case]
    call = operands(counts, k, o, dtype, layout=layout)
    simulator.check_schedules(lambda: products(**call))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    "offsets", [[0, 4, 7, 13], [0, 8, 7, 12], [1, 4, 7, 12], [0, -4, 7, 12], [0, 4, 7, 2**31 - 1]]
)
def test_offsets_out_of_order_stay_inside_the_rows(offsets, dtype):
    """A device cannot refuse what it reads; the simulator reports accesses outside tensors."""
    call = operands((4, 3, 5), 9, 7, dtype, tail=0)
    products(**{**call, "expert_offsets": torch.tensor(offsets, dtype=torch.int32)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_many_tiles_a_block(dtype):
    """More tiles than blocks are resident, and more experts than a warp has lanes."""
    counts = [(i * 7) % 5 for i in range(40)]
    call = operands(counts, 40, 136, dtype)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    size = {k: v.abs() for k, v in wide.items()}
    for got, want, magnitude in zip(
        products(**call), reference_products(**wide), reference_products(**size), strict=True
    ):
        assert_close_by_norm(got, want, magnitude, sum_length=40)


@pytest.mark.parametrize("view", ["k", "o"])
def test_fp32_is_close_to_fp32(view):
    """Three tf32 products: no worse than 2^-21 of the sum of absolute products."""
    call = operands((70,), 8, 64, torch.float32, tail=0, layout=view)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    out = moe_ops.grouped_gemm(call["a"], call["b"], call["expert_offsets"])
    exact = reference.grouped_gemm(wide["a"], wide["b"], call["expert_offsets"])
    magnitude = reference.grouped_gemm(wide["a"].abs(), wide["b"].abs(), call["expert_offsets"])
    assert_close_by_norm(out, exact, magnitude, sum_length=8)
    assert bool(((out.double() - exact).abs() <= 2.0**-21 * magnitude).all())


def test_fp32_infinities_are_those_of_the_product():
    """The corrections of a split product would make NaN of inf * 0 and of inf - inf."""
    huge, most = 1e30, torch.finfo(torch.float32).max
    a = torch.tensor(
        [[torch.inf, 1, 0], [-torch.inf, 1, 0], [torch.nan, 1, 0], [huge, 1, 1], [most, 0, 0]]
    )
    b = torch.tensor([[[1.0, 3, 5], [huge, 1, 2], [0.5, 0, 0], [0.0, 1, 1]]])
    out = moe_ops.grouped_gemm(a, b, torch.tensor([0, 5], dtype=torch.int32))
    want = (a.double() @ b[0].double().T).float()
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    finite = want.isfinite()
    torch.testing.assert_close(out[finite], want[finite], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "counts", "tile_m", "tile_n", "blocks_per_sm"),
    [
        (torch.bfloat16, (70, 0, 5, 64), 64, 64, 3),
        (torch.bfloat16, (170, 0, 5, 128), 128, 256, 1),
        (torch.float32, (70, 0, 5, 64), 64, 64, 2),
    ],
    ids=["bf16-small", "bf16-large", "fp32"],
)
def test_bytes(simulator, dtype, counts, tile_m, tile_n, blocks_per_sm):
    """csrc/cuda/grouped_gemm/NOTES.md has the formula."""
    tail, k, o = 9, 96, 272
    call = operands(counts, k, o, dtype, tail=tail)
    a, b, offsets = call["a"], call["b"], call["expert_offsets"]
    counted = simulator.counted(lambda: moe_ops.grouped_gemm(a, b, offsets), "ld_bytes", "st_bytes")
    column_tiles = -(-o // tile_n)
    row_tiles = sum(-(-c // tile_m) for c in counts)
    tiles = (row_tiles + -(-tail // tile_m)) * column_tiles
    bound = (-(-len(a) // tile_m) + min(len(counts) + 1, len(a))) * column_tiles
    operand_bytes = (sum(counts) * column_tiles + o * row_tiles) * k * dtype.itemsize
    blocks = min(bound, 16 * blocks_per_sm)  # of 16 SMs
    searches = (tiles + blocks) * 4 * (2 * len(counts) + 1)
    assert counted["ld_bytes"] == operand_bytes + searches
    assert counted["st_bytes"] == len(a) * o * dtype.itemsize


@pytest.mark.parametrize(("features", "stretch"), [(512, 256), (264, 256), (37, 32)])
def test_bytes_of_grouped_sum(simulator, features, stretch):
    """Rows once, the result once; each of a block's 256 threads reads two offsets."""
    offsets = torch.tensor([0, 70, 70, 75], dtype=torch.int32)
    rows = torch.randn(80, features).bfloat16()
    counted = simulator.counted(lambda: moe_ops.grouped_sum(rows, offsets), "ld_bytes", "st_bytes")
    blocks = 3 * -(-features // stretch)
    assert counted == {
        "ld_bytes": 2 * 75 * features + blocks * 256 * 8,
        "st_bytes": 2 * 3 * features,
    }


def test_mutants_are_noticed(simulator):
    """Copies, waits, barriers, fragments and stores of the compiled kernels, broken one at a time
    (generic_mutants.py)."""
    noticed = noticed_mutants("generic_mutants")
    assert len(noticed) >= 10
    assert [name for name, how in noticed.items() if how is None] == []

"""The TMA + wgmma grouped GEMMs: every tile of every product, values, bytes, schedules, mutants."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from tests.helpers.ffn import ffn_operands
from tests.helpers.routing import Routing
from tests.helpers.simulator import noticed_mutants

import moe_ops
from moe_ops import reference
from moe_ops.testing import assert_close_by_norm, check_against_reference, eps, short


@dataclass(frozen=True)
class Tile:
    """csrc/cuda/grouped_gemm/config.h"""

    m: int
    n: int
    k: int
    cluster: int
    box_m: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}"


TILES = (
    Tile(128, 256, 64, 2, 64),
    Tile(128, 128, 64, 1, 64),
    Tile(64, 128, 64, 1, 16),
    Tile(64, 64, 128, 1, 16),
)
KERNELS = [
    (product, tile)
    for product, tile in itertools.product(("nt", "nn", "tn"), TILES)
    if product != "tn" or tile.m == 128
]
kernels = pytest.mark.parametrize(("product", "tile"), KERNELS, ids=str)


@pytest.fixture(autouse=True)
def middle_tile(monkeypatch):
    """For tests that are not about tiles."""
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", "128x128")


def operands(product, counts, n, k, dtype=torch.bfloat16, *, tail=3):
    """Arguments of the op: `n` columns of the result; `k` is the length of the sum, and for tn the
    rows of an expert's result. Rows of no expert are NaN: they may not reach a result."""
    rows, experts = sum(counts) + tail, len(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    a = torch.randn(rows, k).to(dtype)
    a[sum(counts) :] = torch.nan
    if product == "tn":
        grad, a = a, torch.randn(rows, n).to(dtype)
        a[sum(counts) :] = torch.nan
        return {"grad": grad, "a": a, "expert_offsets": offsets}
    b = torch.randn(experts, n, k).to(dtype)
    if product == "nn":
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    return {"a": a, "b": b, "expert_offsets": offsets, "bias": torch.randn(experts, n).to(dtype)}


def run(product, call, module=moe_ops):
    op = module.grouped_gemm_wgrad if product == "tn" else module.grouped_gemm
    return op(**call)


def check(product, call):
    wide = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    size = {k: v.abs() for k, v in wide.items()}
    sum_length = int(call["expert_offsets"].diff().max()) if product == "tn" else call["a"].size(1)
    assert_close_by_norm(
        run(product, call),
        run(product, wide, reference),
        run(product, size, reference),
        sum_length=sum_length,
    )


# Experts that end inside a tile, on its edge and just after it, empty ones at every place; N and K
# that are multiples of 8 and of nothing else.
SHAPES = {
    "edges": ((0, 1, 128, 0, 129, 63, 64, 0), 200, 136),
    "small": ((1, 2, 3), 8, 8),
    "wide": ((70, 200), 264, 72),
    "long": ((5, 0, 66), 72, 1032),
    "skewed": ((0, 400, *[1] * 9), 136, 200),
    "one": ((257,), 64, 64),
    "none": ((0, 0), 64, 64),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("shape", SHAPES)
@kernels
def test_values(simulator, monkeypatch, product, tile, shape, dtype):
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", str(tile))
    call = operands(product, *SHAPES[shape], dtype)
    counted = simulator.counted(lambda: check(product, call), "wgmma")
    assert (counted["wgmma"] > 0) == (shape != "none"), "another kernel ran"
    assert simulator.warnings() == ""


@kernels
def test_schedules(simulator, monkeypatch, product, tile):
    """More tiles than blocks, and sums longer than the ring."""
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", str(tile))
    call = operands(product, (tile.m + 1, 0, 3, 2 * tile.m, 70), 2 * tile.n + 8, 648)
    if product == "tn":
        call = operands(product, (500, 0, 3, 65), tile.n + 8, tile.m + 8)
    with simulator.options(sms=4):
        simulator.check_schedules(lambda: run(product, call))


@kernels
def test_bytes(simulator, monkeypatch, product, tile):
    """csrc/cuda/grouped_gemm/NOTES.md has the formula: A once per column tile, in boxes that hold
    rows of the group; B once per row tile, or once a pair of them; the result once, with 128x256 in
    boxes of 16 rows x 64 columns."""
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", str(tile))
    counts, n, k, tail = (tile.m + 1, 0, 3, 2 * tile.m, 70), tile.n + 8, 136, 3
    call = operands(product, counts, n, k, tail=tail)
    counted = simulator.counted(
        lambda: run(product, call), "tma_ld_bytes", "st_bytes", "tma_st_bytes"
    )
    a_bytes = b_bytes = 0
    for count in counts:
        m, steps = (k, -(-count // tile.k)) if product == "tn" else (count, -(-k // tile.k))
        column_tiles, row_tiles = -(-n // tile.n), -(-m // tile.m)
        # A row tile without a partner is computed by a cluster's blocks, in other columns of it;
        # one of them may find no column that is left, and loads the last one's operands again.
        together, single = divmod(row_tiles, tile.cluster)
        singles = single * -(-column_tiles // tile.cluster) * tile.cluster
        b_bytes += (together * column_tiles + singles) * steps * tile.n * tile.k * 2
        if product == "tn":
            lines = (together * tile.cluster * column_tiles + singles) * tile.m
        else:
            lines = column_tiles * -(-m // tile.box_m) * tile.box_m
        a_bytes += steps * lines * tile.k * 2
    assert counted["tma_ld_bytes"] == a_bytes + b_bytes
    groups = [k] * len(counts) if product == "tn" else [*counts, tail]
    boxed = str(tile) == "128x256"
    boxes = sum(-(-rows // 16) for rows in groups) * -(-n // 64)
    assert counted["st_bytes"] == (0 if boxed else sum(groups) * n * 2)
    assert counted["tma_st_bytes"] == (boxes * 16 * 128 if boxed else 0)


def test_many_experts(simulator):
    """More than the 128 experts that a warp scans at once; the last one is the one with rows."""
    for counts in ((*[0] * 300, 5), (3, *[0] * 140, 200, *[0] * 9), [i % 3 for i in range(260)]):
        check("nt", operands("nt", counts, 72, 64))


@pytest.mark.parametrize("product", ["nt", "nn", "tn"])
def test_nan_of_an_expert_stays_with_it(simulator, product):
    call = operands(product, (70, 3, 0, 65), 136, 72)
    for name in ("a", "grad"):
        if name in call:
            call[name][70:73] = torch.nan
    check(product, call)


@pytest.mark.parametrize("product", ["nt", "tn"])
@pytest.mark.parametrize(
    "offsets", [[0, 4, 7, 13], [0, 8, 7, 12], [1, 4, 7, 12], [0, -4, 7, 12], [0, 4, 7, 2**31 - 1]]
)
def test_offsets_out_of_order_stay_inside_the_rows(simulator, product, offsets):
    """A device cannot refuse what it reads; every access outside a tensor would be reported."""
    call = operands(product, (4, 3, 5), 16, 24, tail=0)
    run(product, {**call, "expert_offsets": torch.tensor(offsets, dtype=torch.int32)})


VIEWS = {
    "rows": lambda t: torch.cat([t, t], -1)[..., : t.size(-1)],  # strides of 16 bytes
    "odd_rows": lambda t: torch.nn.functional.pad(t, (0, 1))[..., : t.size(-1)],
    "odd_start": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["a", "b", "grad"])
def test_strides_and_alignment(simulator, name, view):
    """The generic kernels compute what TMA cannot read."""
    product = "tn" if name == "grad" else "nt"
    call = operands(product, (5, 0, 70), 72, 80)
    call[name] = VIEWS[view](call[name])
    counted = simulator.counted(lambda: check(product, call), "wgmma")
    assert (counted["wgmma"] > 0) == (view == "rows")


@pytest.mark.parametrize(("n", "k"), [(71, 64), (64, 71), (64, 4)])
def test_odd_sizes_go_to_the_generic_kernels(simulator, n, k):
    call = operands("nt", (5, 0, 70), n, k)
    assert simulator.counted(lambda: check("nt", call), "wgmma")["wgmma"] == 0


@pytest.mark.parametrize("product", ["nt", "nn"])
def test_experts_that_share_a_matrix(simulator, product):
    """A stride of zero is no tensor map."""
    call = operands(product, (5, 0, 70), 72, 80)
    call["b"] = call["b"][:1].expand(3, -1, -1)
    check(product, call)


# Rows that come through an index: the products of tokens and slots. moe_linear_map gathers tokens
# forward, slots backward, both in its weight gradient, and scatters by slot; moe_ffn gathers one
# side of its weight gradients.
ROUTING = Routing(75, 5, 2, "dropped")
GATHERING = pytest.mark.parametrize("tile", ["128x128", "64x128", "64x64"])


def linear_map_operands(dtype):
    return {
        "x": torch.randn(75, 136).to(dtype),
        "w": torch.randn(5, 200, 136).to(dtype),
        "topk_ids": ROUTING.ids(),
        "bias": torch.randn(5, 200).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@GATHERING
def test_gathered_rows(simulator, monkeypatch, tile, dtype):
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", tile)
    call = linear_map_operands(dtype)

    def run():
        check_against_reference(
            moe_ops.moe_linear_map,
            reference.moe_linear_map,
            call,
            ("x", "w", "bias"),
            sum_length=200,
            grad_steps=1,
        )

    assert simulator.counted(run, "wgmma")["wgmma"] > 0
    assert simulator.warnings() == ""


@GATHERING
def test_schedules_of_gathered_rows(simulator, monkeypatch, tile):
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", tile)
    call = linear_map_operands(torch.bfloat16)
    leaves = {name: call[name].requires_grad_() for name in ("x", "w", "bias")}
    grad = torch.randn(75, 2, 200).bfloat16()

    def run():
        h = moe_ops.moe_linear_map(**call)
        return (h.detach(), *torch.autograd.grad(h, list(leaves.values()), grad))

    with simulator.options(sms=4):
        simulator.check_schedules(run)


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=short)
def test_weight_gradients_with_one_side_gathered_are_added(simulator, main_dtype):
    """grad_y by token times rows for w_down, rows times x by token for w_gate_up."""
    call = ffn_operands(ROUTING, 136, 72, torch.bfloat16)
    names = ("x", "w_gate_up", "w_down", "topk_weights")
    leaves = {name: call[name].clone().requires_grad_() for name in names}
    grad_y = torch.randn(75, 136).bfloat16()
    moe_ops.moe_ffn(**{**call, **leaves}).backward(grad_y)
    main = tuple(torch.randn(call[name].shape).to(main_dtype) for name in names[1:3])
    sums = [m.double() + leaves[n].grad.double() for m, n in zip(main, names[1:3], strict=True)]
    with_main = {name: call[name].clone().requires_grad_() for name in names}
    y = moe_ops.moe_ffn(**{**call, **with_main}, main_grads=main)
    assert simulator.counted(lambda: y.backward(grad_y), "wgmma")["wgmma"] > 0
    for got, want, name in zip(main, sums, names[1:3], strict=True):
        # The gradient that is not added is rounded to the weight's type.
        size = leaves[name].grad.double().abs() + want.abs()
        error = (got.double() - want).abs()
        assert bool((error <= (0.5 * eps(torch.bfloat16) + eps(main_dtype)) * size).all())


@pytest.mark.full
def test_mutants_are_noticed(simulator):
    """Waits, fences, arrivals, counts, coordinates and descriptors of the compiled kernels, broken
    one at a time (sm90_mutants.py)."""
    noticed = noticed_mutants("sm90_mutants")
    assert len(noticed) >= 10
    assert [name for name, how in noticed.items() if how is None] == []

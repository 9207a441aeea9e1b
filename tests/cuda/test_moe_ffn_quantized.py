"""moe_ffn_quantized on the simulator: both kernels, schedules, bytes.

csrc/cuda/moe_ffn_quantized/NOTES.md has the formulas of the bytes.
"""

from __future__ import annotations

import pytest
import torch
from tests.helpers.quantized import (
    check_moe_ffn_quantized,
    quantized_operands,
    slots_of_experts,
)
from tests.helpers.routing import Routing
from tests.helpers.simulator import noticed_mutants

import moe_ops
from moe_ops.testing import assert_identical, short

FORMATS = ((8, 0), (4, 32), (4, 64), (4, 128))
formats = pytest.mark.parametrize(
    "bits_group", FORMATS, ids=["int8", "int4 g32", "int4 g64", "int4 g128"]
)
kernels = pytest.mark.parametrize("kernel", ["few", "tiles"])
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def chosen_kernel(request, monkeypatch):
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "kernel" in params:
        monkeypatch.setenv("MOE_OPS_QUANT_KERNEL", params["kernel"])


# Kernels find rows before they look at types: every kind of routing in one of them.
KINDS_AND_TYPES = [
    pytest.param(
        kind,
        dtype,
        marks=() if of_all or dtype == torch.bfloat16 else pytest.mark.full,
        id=f"{short(dtype)}-{kind}",
    )
    for kind, of_all in (
        ("skewed", False),
        ("dropped", True),
        ("out_of_range", False),
        ("one_expert", True),
    )
    for dtype in (torch.float32, *HALVES)
]


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_TYPES)
@formats
@kernels
def test_values(simulator, kernel, bits_group, dtype, kind):
    """Experts with more rows than a block takes at once, a last tile that is not full, ids that
    name no expert."""
    call = quantized_operands(Routing(70, 5, 2, kind), 256, 128, dtype, *bits_group, bias=True)
    check_moe_ffn_quantized(call)
    assert simulator.warnings() == ""


@pytest.mark.parametrize("rows", [300, 512])
@pytest.mark.parametrize("dtype", HALVES, ids=short)
@formats
def test_tall_tiles(simulator, bits_group, dtype, rows):
    """64 rows per expert and more take tiles of 128."""
    call = quantized_operands(Routing(rows, 2, 1), 192 + 64, 128, dtype, *bits_group)
    check_moe_ffn_quantized(call)
    assert simulator.warnings() == ""


@pytest.mark.parametrize(
    ("activation", "interleaved"),
    [
        ("swiglu", False),
        ("swiglu_oai", True),
        ("geglu", False),
        ("geglu_tanh", True),
        ("relu2", False),
        ("silu", False),
    ],
)
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@kernels
def test_epilogues(kernel, on_input, activation, interleaved):
    routing = Routing(20, 3, 2, "dropped")
    call = quantized_operands(
        routing, 96, 160, torch.bfloat16, 4, 32, activation=activation, bias=True, x_scale=True
    )
    options = {"interleaved": interleaved, "apply_router_weight_on_input": on_input}
    check_moe_ffn_quantized({**call, **options})


@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (33, 65), (129, 100), (47, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@kernels
def test_rows_that_start_anywhere(kernel, dtype, sizes):
    check_moe_ffn_quantized(
        quantized_operands(Routing(20, 3, 2, "dropped"), *sizes, dtype, 8, bias=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@formats
@kernels
def test_schedules(simulator, kernel, bits_group, dtype):
    """Blocks take several tiles, and go round their stages more than once."""
    routing = Routing(40, 3, 2, "dropped")
    call = quantized_operands(routing, 256, 128, dtype, *bits_group, bias=True, x_scale=True)
    with simulator.options(sms=2):
        simulator.check_schedules(lambda: moe_ops.moe_ffn_quantized(**call))


@formats
def test_a_row_keeps_its_bits_beside_others(bits_group):
    """Few tokens: the number of rows at once changes nothing about the sums of one."""
    call = quantized_operands(Routing(8, 3, 2), 512, 128, torch.bfloat16, *bits_group)
    whole = moe_ops.moe_ffn_quantized(**call)
    rows = {name: call[name][:3] for name in ("x", "topk_weights", "topk_ids")}
    assert_identical(moe_ops.moe_ffn_quantized(**{**call, **rows}), whole[:3])


@pytest.mark.full
def test_mutants_are_noticed(simulator):
    """Exchanges, barriers, products and stores of the compiled kernels (quantized_mutants.py)."""
    noticed = noticed_mutants("quantized_mutants")
    assert len(noticed) >= 10
    assert [name for name, how in noticed.items() if how is None] == []


# --- bytes


def line_bytes(depth, bits):
    return depth * bits // 8


def scale_bytes(lines, depth, bits, sharing):
    """Scales as kernels read them: 4 bits, one for each 16 bytes of codes; 8 bits, one for each
    of the `sharing` threads that finish a line."""
    return 4 * lines * (depth // 32 if bits == 4 else sharing)


def around(call):
    """Loads and stores of sort_by_expert and unpermute, and the stores of h, rows and y."""
    t, h = call["x"].shape
    n, e = call["topk_ids"].numel(), len(call["w_down"])
    i = call["w_gate_up"].shape[1] // 2
    loads = 2 * 4 * n + n * h * 2 + -(-h * 2 // 1024) * (8 * n + 4 * t)
    stores = 8 * n + 4 * (e + 1) + 2 * (n * i + n * h + t * h)
    return loads, stores


@pytest.mark.parametrize("tokens", [1, 5, 8, 24])
@pytest.mark.parametrize("experts", [2, pytest.param(7, marks=pytest.mark.full), 130])
@formats
def test_few_tokens_read_each_code_once(simulator, bits_group, experts, tokens):
    bits, group = bits_group
    h, i = 384, 256 if group == 128 else 128 if group == 64 else 160
    call = quantized_operands(Routing(tokens, experts, 1), h, i, torch.bfloat16, bits, group)
    counted = simulator.counted(
        lambda: moe_ops.moe_ffn_quantized(**call), "ld_bytes", "st_bytes", "tma_ld_bytes"
    )
    slots = slots_of_experts(call).tolist()
    rows = [r for r in slots if r > 0]
    assert max(rows) <= (8 if tokens <= 8 else 32), "else an expert is read again"
    warps, row_tiles = (8, 1) if tokens <= 8 else (4, 4)
    loads, stores = around(call)
    # Lines of w are read 32 a block, whatever they are.
    for lines, depth, gathered in ((2 * i, h, True), (h, i, False)):
        tiles = lines // 32
        loads += len(rows) * lines * line_bytes(depth, bits)  # each code once
        loads += sum(scale_bytes(lines, depth, bits, r) for r in rows)
        # x, once per block, 8 rows at a time; 8 bits take steps of 64 codes.
        read = depth if bits == 4 else -(-depth // 64) * 64
        loads += sum(-(-r // 8) * 8 for r in rows) * read * 2 * tiles
        if gathered:
            loads += len(rows) * tiles * warps * row_tiles * 32 * 4
        # Finding the expert: up to 128 at a time, five offsets a lane, and where its rows are.
        looked = sum(e // 128 + 1 for e, r in enumerate(slots) if r > 0)
        looked += (min(experts, tokens) - len(rows)) * -(-experts // 128)
        loads += tiles * warps * (looked * 640 + len(rows) * 256)
    assert counted["st_bytes"] == stores
    assert counted["ld_bytes"] == loads
    assert counted["tma_ld_bytes"] == 0


@formats
def test_tiles_read_codes_once_for_64_rows(simulator, monkeypatch, bits_group):
    monkeypatch.setenv("MOE_OPS_QUANT_KERNEL", "tiles")
    bits, group = bits_group
    tokens, experts, h, i, sms = 150, 4, 384, 256, 2
    call = quantized_operands(Routing(tokens, experts, 1), h, i, torch.bfloat16, bits, group)
    with simulator.options(sms=sms):
        counted = simulator.counted(
            lambda: moe_ops.moe_ffn_quantized(**call), "ld_bytes", "st_bytes"
        )
    rows = slots_of_experts(call).tolist()
    row_tiles = sum(-(-r // 64) for r in rows)
    loads, stores = around(call)
    for lines, depth, gathered in ((2 * i, h, True), (h, i, False)):
        columns = lines // 128
        loads += row_tiles * lines * line_bytes(depth, bits)
        loads += row_tiles * scale_bytes(lines, depth, bits, 16)
        loads += sum(rows) * columns * (depth * 2 + (32 if gathered else 0))
        tiles, grid = row_tiles * columns, 2 * sms
        loads += 8 * 8 * experts * (tiles + grid)  # every warp looks for its tile
    assert counted["st_bytes"] == stores
    assert counted["ld_bytes"] == loads

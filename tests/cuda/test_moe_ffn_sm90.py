"""moe_ffn's own kernels for sm_90a: every tile, values, gradients, schedules, bytes, mutants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_ops
from moe_ops import reference
from moe_ops.testing import (
    GATED_ACTIVATIONS,
    PLAIN_ACTIVATIONS,
    Routing,
    assert_identical,
    check_against_reference,
    ffn_operands,
    moe_ffn_magnitude,
    short,
)

# csrc/cuda/moe_ffn/config.h: rows of a tile, columns of w_gate_up, row tiles that share weights.
UP_TILES = {"low": (64, 256, 1), "high": (128, 256, 1), "pair": (128, 256, 2)}
LAYOUTS = {
    "halves": ("swiglu", False),
    "interleaved": ("swiglu_oai", True),
    "plain": ("relu2", False),
}
HALF = (torch.bfloat16, torch.float16)
FLOATS = ("x", "w_gate_up", "w_down", "topk_weights", "b_gate_up", "b_down")
ROUTINGS = (
    Routing(300, 3, 2, "skewed"),
    Routing(200, 5, 2, "dropped"),
    Routing(131, 4, 1, "half_empty", torch.int64),
    Routing(90, 6, 3, "one_expert"),
    Routing(70, 300, 2, "uniform"),  # more experts than a warp scans at once
    Routing(13, 4, 3, "all_dropped"),
    Routing(23, 4, 6, "repeated"),
    Routing(1, 1, 1),
)

tiles = pytest.mark.parametrize("tile", UP_TILES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
half = pytest.mark.parametrize("dtype", HALF, ids=short)


def operands(routing, hidden_size, intermediate_size, dtype, layout="halves", **kwargs):
    activation, interleaved = LAYOUTS[layout]
    call = ffn_operands(
        routing, hidden_size, intermediate_size, dtype, activation=activation, **kwargs
    )
    return {**call, "interleaved": interleaved}


def differentiable(call):
    return [name for name in FLOATS if call.get(name) is not None]


def check(call, wrt=None):
    """Rounded on the way: the pre-activation (read again in backward), h, an expert's output, and
    in backward the gradients of these."""
    sizes = (*call["x"].shape, call["w_down"].shape[-1], call["topk_ids"].numel(), 1)
    check_against_reference(
        moe_ops.moe_ffn,
        reference.moe_ffn,
        call,
        differentiable(call) if wrt is None else wrt,
        magnitude=moe_ffn_magnitude,
        sum_length=max(sizes),
        steps=2,
        grad_steps=5,
    )


@pytest.fixture
def force(monkeypatch):
    def set_tile(tile):
        monkeypatch.setenv("MOE_OPS_FFN_TILE", tile)

    return set_tile


# Columns and sums that end inside a tile, on its edge, after one multiple of 8; sums longer than
# the ring.
SIZES = ((72, 136), (64, 128), (8, 8), (648, 264))


@half
@layouts
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), SIZES)
@tiles
def test_sizes(simulator, force, tile, hidden_size, intermediate_size, layout, dtype):
    force(tile)
    check(operands(Routing(150, 3, 2, "dropped"), hidden_size, intermediate_size, dtype, layout))
    assert simulator.warnings() == ""


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@tiles
def test_routings(simulator, force, tile, routing):
    force(tile)
    check(operands(routing, 72, 136, torch.bfloat16, bias=True))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
@half
def test_activations(simulator, force, activation, interleaved, bias, dtype):
    if interleaved and activation in PLAIN_ACTIVATIONS:
        pytest.skip("Nothing to interleave.")
    force("high")
    call = ffn_operands(
        Routing(40, 3, 2, "dropped"), 72, 40, dtype, activation=activation, bias=bias
    )
    check({**call, "interleaved": interleaved})


@half
@layouts
@tiles
def test_weight_on_input(simulator, force, tile, layout, dtype):
    force(tile)
    call = operands(Routing(140, 3, 2, "dropped"), 72, 136, dtype, layout, bias=True)
    check({**call, "apply_router_weight_on_input": True})


@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
def test_one_gradient_at_a_time(simulator, on_input, wanted):
    call = operands(Routing(40, 3, 2, "dropped"), 72, 136, torch.bfloat16, bias=True)
    check({**call, "apply_router_weight_on_input": on_input}, [wanted])


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("main_dtype", [torch.bfloat16, torch.float32], ids=short)
def test_main_grads(simulator, main_dtype, on_input):
    call = operands(Routing(60, 4, 2, "half_empty"), 72, 136, torch.bfloat16)
    call["apply_router_weight_on_input"] = on_input
    leaves = {n: call[n].clone().requires_grad_() for n in ("x", "w_gate_up", "w_down")}
    grad_y = torch.randn_like(call["x"])
    expected = torch.autograd.grad(
        moe_ops.moe_ffn(**{**call, **leaves}), list(leaves.values()), grad_y
    )
    before = [torch.randn_like(w, dtype=main_dtype) for w in expected[1:]]
    main = tuple(b.clone() for b in before)
    moe_ops.moe_ffn(**{**call, **leaves}, main_grads=main).backward(grad_y)
    assert_identical(leaves["x"].grad, expected[0])
    for got, start, gradient in zip(main, before, expected[1:], strict=True):
        # One rounding of the gradient to compare with, and one of the sum.
        bound = torch.finfo(torch.bfloat16).eps * gradient.double().abs()
        bound += torch.finfo(main_dtype).eps * (start.double().abs() + gradient.double().abs())
        error = (got.double() - start.double() - gradient.double()).abs()
        assert bool((error <= bound + torch.finfo(main_dtype).tiny).all())


@half
@layouts
@pytest.mark.parametrize("num_tokens", [1, 9, 33, 64])
def test_few_tokens(simulator, num_tokens, layout, dtype):
    """Inference of at most 64 tokens has kernels of its own."""
    call = operands(Routing(num_tokens, 5, 2, "dropped"), 328, 200, dtype, layout, bias=True)
    check(call, [])
    check({**call, "apply_router_weight_on_input": True}, [])
    # One expert takes more rows than a tile holds.
    routing = Routing(num_tokens, 200, 3, "repeated")
    call |= operands(routing, 328, 72, dtype, layout)
    call["topk_ids"] = torch.full_like(call["topk_ids"], 150)
    check({**call, "b_gate_up": None, "b_down": None}, [])


@half
@layouts
def test_few_tokens_and_many_give_the_same_bits(simulator, force, layout, dtype):
    call = operands(Routing(50, 5, 2, "dropped"), 328, 200, dtype, layout, bias=True)
    few = moe_ops.moe_ffn(**call)
    for tile in UP_TILES:
        force(tile)
        assert_identical(moe_ops.moe_ffn(**call), few, tile)


def forward_and_backward(call, wrt=None):
    leaves = {n: call[n].clone().requires_grad_() for n in wrt or differentiable(call)}
    grad = torch.randn_like(call["x"])

    def run():
        y = moe_ops.moe_ffn(**{**call, **leaves})
        return (y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad))

    return run


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@layouts
@tiles
@pytest.mark.full
def test_schedules(simulator, force, tile, layout, on_input):
    """More tiles than blocks, and sums longer than the ring."""
    force(tile)
    call = operands(Routing(170, 3, 2, "dropped"), 456, 264, torch.bfloat16, layout, bias=True)
    call["apply_router_weight_on_input"] = on_input
    with simulator.options(sms=4):
        simulator.check_schedules(forward_and_backward(call))


@pytest.mark.parametrize("num_tokens", [5, 60])
@layouts
@pytest.mark.full
def test_schedules_of_few_tokens(simulator, num_tokens, layout):
    call = operands(Routing(num_tokens, 4, 2, "dropped"), 456, 328, torch.float16, layout)
    simulator.check_schedules(lambda: moe_ops.moe_ffn(**call))


def rows_of_experts(call):
    offsets = reference.sort_slots(call["topk_ids"], call["w_down"].shape[0])[0]
    return offsets.diff().tolist()


def ceil(a, b):
    return -(-a // b)


def gemm_tma_bytes(counts, n, k, m_tile, n_tile, cluster, box_m=None):
    """Of a row tile and a column tile: B once a cluster, A in boxes unless it is gathered."""
    bytes_ = 0
    for count in counts:
        steps, columns = ceil(k, 64), ceil(n, n_tile)
        bytes_ += ceil(count, m_tile * cluster) * columns * steps * n_tile * 64 * 2
        if box_m is not None:
            bytes_ += ceil(count, box_m) * box_m * columns * steps * 64 * 2
    return bytes_


@layouts
@tiles
def test_bytes_of_forward(simulator, force, monkeypatch, tile, layout):
    """csrc/cuda/moe_ffn/NOTES.md has the formula: weights once a row tile, x once a column tile, h
    and the rows of the result written once; no permuted copy of x."""
    force(tile)
    monkeypatch.setenv("MOE_OPS_GEMM_TILE", "128x128")
    m, n_tile, cluster = UP_TILES[tile]
    counted = {}
    for hidden_size in (136, 392):
        torch.manual_seed(3)
        call = operands(Routing(170, 3, 2, "dropped"), hidden_size, 264, torch.bfloat16, layout)
        counted[hidden_size] = simulator.counted(
            lambda call=call: moe_ops.moe_ffn(**call),
            *("ld_bytes", "st_bytes", "tma_ld_bytes", "tma_st_bytes"),
        )
        counts = rows_of_experts(call)
        rows, width = sum(counts), call["w_gate_up"].shape[1]
        up = gemm_tma_bytes(counts, width, hidden_size, m, n_tile, cluster)
        down = gemm_tma_bytes(counts, hidden_size, 264, 128, 128, 1, box_m=64)
        assert counted[hidden_size]["tma_ld_bytes"] == up + down
        assert counted[hidden_size]["tma_st_bytes"] == 0
        sorted_ = 2 * 4 * 340 + 4 * 4  # by sort_slots: two maps and the offsets
        written = 2 * rows * 264 + 2 * rows * hidden_size + 2 * 170 * hidden_size
        assert counted[hidden_size]["st_bytes"] == sorted_ + written
    # What does not grow with H are indices and weights of rows. Offsets are read again for every
    # tile, and there are more column tiles of the result: at most 16 KiB here.
    x_bytes = 2 * rows * ceil(width, n_tile) * (392 - 136)
    combine = 2 * rows * (392 - 136)
    grown = counted[392]["ld_bytes"] - counted[136]["ld_bytes"]
    assert 0 <= grown - (x_bytes + combine) <= 16 * 1024


@layouts
def test_bytes_of_few_tokens(simulator, layout):
    """Weights of the experts with rows, once."""
    call = operands(Routing(9, 6, 2, "half_empty"), 256, 384, torch.bfloat16, layout)
    counted = simulator.counted(lambda: moe_ops.moe_ffn(**call), "tma_ld_bytes", "tma_st_bytes")
    active = sum(count > 0 for count in rows_of_experts(call))
    weights = call["w_gate_up"][0].numel() + call["w_down"][0].numel()
    assert 0 < active <= 3
    assert counted == {"tma_ld_bytes": 2 * active * weights, "tma_st_bytes": 0}


@pytest.mark.parametrize("view", ["rows", "odd_rows", "odd_start"])
@pytest.mark.parametrize("name", ["x", "w_gate_up", "w_down", "b_gate_up"])
def test_strides_and_alignment(simulator, name, view):
    """Strides of 16 bytes stay, others are composed."""
    call = operands(Routing(80, 3, 2, "dropped"), 72, 136, torch.bfloat16, bias=True)
    t = call[name]
    call[name] = {
        "rows": lambda: torch.cat([t, t], -1)[..., : t.size(-1)],
        "odd_rows": lambda: torch.nn.functional.pad(t, (0, 1))[..., : t.size(-1)],
        "odd_start": lambda: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    }[view]()
    check(call)
    check({k: v[:9] if k in ("x", "topk_ids", "topk_weights") else v for k, v in call.items()}, [])


@pytest.mark.parametrize("num_tokens", [40, 90])
@pytest.mark.full
def test_nan_stays_in_its_token_and_its_expert(simulator, num_tokens):
    call = operands(Routing(num_tokens, 4, 2, "half_empty"), 72, 136, torch.bfloat16)
    call["x"][5] = torch.nan
    call["topk_ids"][5] = torch.tensor([0, -1])
    call["w_gate_up"][1] = torch.nan  # no rows
    call["w_down"][3] = torch.nan
    y = moe_ops.moe_ffn(**call)
    where = torch.zeros(num_tokens, 72, dtype=torch.bool)
    where[5] = True
    assert_identical(y.isnan(), where)


@pytest.mark.full
def test_mutants_are_noticed(simulator):
    """The compiled kernels broken in one place at a time (moe_ffn_mutants.py)."""
    script = Path(__file__).with_name("moe_ffn_mutants.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    noticed = json.loads(done.stdout)
    assert len(noticed) >= 10
    assert [name for name, how in noticed.items() if how is None] == []

"""Weights as checkpoints store them on the simulator: the kernel for few rows per expert, in blocks
of experts and alone, its schedules and its bytes.

csrc/cuda/moe_ffn_quantized/NOTES.md has the arithmetic of the bytes.
"""

from __future__ import annotations

import pytest
import torch
from tests.helpers.quantized import (
    STORED_GROUPS,
    STORED_RECORDS,
    any_format,
    check_moe_ffn_quantized,
    check_unrounded_gemm,
    slots_of_experts,
    stored_call,
    stored_gemm_call,
)
from tests.helpers.routing import Routing

import moe_ops
from moe_ops.reference._codes import dequantized
from moe_ops.testing import assert_identical, short
from moe_ops.weight_formats import parse_format

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=short)
# Inputs that share a scale, and a number of inputs that fills no step of the kernel.
UNITS = {kind: unit for kind, (_, unit, _, _) in STORED_GROUPS.items()} | STORED_RECORDS
kinds = pytest.mark.parametrize("kind", UNITS)


def depths(kind):
    """Returns sizes H and I: one of several steps, and one that ends within a step if it can."""
    unit = UNITS[kind]
    return (512, 256) if unit == 256 else (9 * unit, 5 * unit) if unit > 1 else (417, 139)


@kinds
@pytest.mark.parametrize(
    ("routing", "dtype"),
    [
        pytest.param(
            routing,
            dtype,
            id=f"{routing}-{short(dtype)}",
            marks=() if row == column else pytest.mark.full,
        )
        for row, routing in enumerate(("skewed", "out_of_range", "half_empty"))
        for column, dtype in enumerate(FLOATS)
    ],
)
def test_values(simulator, routing, dtype, kind):
    """Experts without rows and with more than 8, ids that name none, gate and up, biases."""
    call = stored_call(kind, Routing(14, 5, 2, routing), *depths(kind), dtype, bias=True)
    check_moe_ffn_quantized(call)
    assert simulator.warnings() == ""


@pytest.mark.parametrize(
    ("activation", "interleaved"),
    [("swiglu", True), ("swiglu_oai", True), ("geglu", False), ("relu2", False), ("silu", False)],
)
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "q6_k", "nvfp4"])
def test_epilogues(kind, on_input, activation, interleaved):
    routing, dtype = Routing(9, 3, 2, "dropped"), torch.bfloat16
    options = {"bias": True, "x_scale": True, "activation": activation}
    call = stored_call(kind, routing, *depths(kind), dtype, **options)
    options = {"interleaved": interleaved, "apply_router_weight_on_input": on_input}
    check_moe_ffn_quantized({**call, **options})


@kinds
def test_formats_may_differ(kind):
    call = stored_call(kind, Routing(3, 3, 2), 512, depths(kind)[1], torch.bfloat16)
    del call["w_gate_up"], call["w_gate_up_scale"]
    call.pop("w_gate_up_zero", None)
    parts = any_format("int8", 3, 2 * depths(kind)[1], call["x"].shape[1])
    call |= {f"w_gate_up{part}": value for part, value in parts.items()}
    check_moe_ffn_quantized(call | {"format": f"int8, {kind}"})


@kinds
def test_no_token_and_no_expert(kind):
    call = stored_call(kind, Routing(4, 3, 2, "all_dropped"), *depths(kind), torch.bfloat16)
    assert not moe_ops.moe_ffn_quantized(**call).any()
    for name in ("x", "topk_weights", "topk_ids"):
        call[name] = call[name][:0]
    assert moe_ops.moe_ffn_quantized(**call).shape == (0, call["x"].shape[1])


@kinds
@dtypes
@pytest.mark.parametrize("counts", [(1,), (9, 0, 2), (0, 0)], ids=str)
def test_dense_layers(kind, counts, dtype):
    """One expert, several, none with rows; rows behind the last expert's become zeros."""
    for features in (1, 35):
        call = stored_gemm_call(kind, counts, depths(kind)[0], features, dtype)
        check_unrounded_gemm(call)
        assert not moe_ops.grouped_gemm_quantized(**call)[sum(counts) :].any()


@dtypes
def test_weights_that_are_not_finite_or_subnormal(dtype):
    """e4m3 has NaN of either sign; scales of MXFP4 are powers from 2^-127 on, or NaN."""
    for kind, byte in (("fp8", 0x7F), ("e4m3", 0xFF), ("nvfp4", 0x7F), ("nvfp4", 0xFF)):
        call = stored_gemm_call(kind, (3,), 208, 9, dtype)
        changed = call["b_scale"] if kind == "nvfp4" else call["b"].view(torch.uint8)
        changed[0, 4, 10] = byte
        y = moe_ops.grouped_gemm_quantized(**call)[:3]
        assert y[:, 4].isnan().all() and y.isnan().sum() == 3
    call = stored_gemm_call("mxfp4", (3,), 96, 9, dtype)
    call["b_scale"][0, 4, 1] = 255
    y = moe_ops.grouped_gemm_quantized(**call)[:3]
    assert y[:, 4].isnan().all() and y.isnan().sum() == 3
    if dtype != torch.float16:  # whose numbers are too small for these scales
        call["a"] *= 2.0**120
        call["b_scale"][:] = torch.arange(3, dtype=torch.uint8)
        check_unrounded_gemm(call)


@dtypes
@pytest.mark.parametrize("kind", ["e4m3", "mxfp4", "nvfp4", "q6_k", "int4 g64 bfloat16 zero"])
def test_every_code(kind, dtype):
    """Products with unit vectors are the weights, rounded to x's type once."""
    call = stored_gemm_call(kind, (256,), 256, 16, dtype)
    call["a"] = torch.cat([torch.eye(256), torch.zeros(2, 256)]).to(dtype)
    call["bias"] = torch.zeros_like(call["bias"])
    if kind == "e4m3":
        codes = torch.arange(256, dtype=torch.uint8)
        call["b"].view(torch.uint8)[0] = torch.where(codes & 0x7F == 0x7F, 0, codes)
    parts = (call["b"], call["b_scale"], call.get("b_zero"))
    weights = dequantized(*parts, format=kind, dtype=torch.float64)[0].T
    y = moe_ops.grouped_gemm_quantized(**call)[:256].double()
    step = torch.finfo(dtype).eps
    assert ((y - weights).abs() <= 0.51 * step * weights.abs() + 2.0**-25).all()


@kinds
def test_memory_that_starts_anywhere(kind):
    """Codes and scales as views into files; rows of every second expert."""
    call = stored_gemm_call(kind, (2, 3), depths(kind)[0], 20, torch.bfloat16)
    want = moe_ops.grouped_gemm_quantized(**call)

    def moved(t):
        size = t.element_size()
        wide = torch.zeros(t.numel() + 1, dtype=t.dtype)
        wide[1:] = t.flatten()
        assert wide[1:].data_ptr() % (2 * size) != 0 or size > 1
        return wide[1:].view(t.shape)

    parts = {name: moved(call[name]) for name in ("b", "b_scale", "b_zero") if name in call}
    assert_identical(moe_ops.grouped_gemm_quantized(**{**call, **parts}), want)
    strided = torch.zeros(2 * len(call["b"]), *call["b"].shape[1:], dtype=call["b"].dtype)
    strided[::2] = call["b"]
    assert_identical(moe_ops.grouped_gemm_quantized(**{**call, "b": strided[::2]}), want)


@kinds
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)],
    ids=short,
)
def test_schedules(simulator, kind, dtype):
    call = stored_call(kind, Routing(10, 3, 2, "dropped"), *depths(kind), dtype, bias=True)
    with simulator.options(sms=2):
        simulator.check_schedules(lambda: moe_ops.moe_ffn_quantized(**call))


@kinds
def test_a_row_keeps_its_bits_beside_others(kind):
    call = stored_call(kind, Routing(20, 3, 2), *depths(kind), torch.bfloat16)
    whole = moe_ops.moe_ffn_quantized(**call)
    rows = {name: call[name][5:6] for name in ("x", "topk_weights", "topk_ids")}
    assert_identical(moe_ops.moe_ffn_quantized(**{**call, **rows}), whole[5:6])


# --- bytes


def stored_bytes(call, name):
    """Returns the bytes of one expert's weight: codes, scales and zero points."""
    parts = (call.get(f"{name}{part}") for part in ("", "_scale", "_zero"))
    return sum(t[0].numel() * t.element_size() for t in parts if t is not None)


@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(6, 2), (1, 12), *(pytest.param(*more, marks=pytest.mark.full) for more in ((1, 2), (6, 12)))],
)
@kinds
def test_touched_experts_are_read_once(simulator, kind, tokens, experts):
    """Up to 8 rows per expert: loads are those of x, of the maps and of the weights."""
    size = 768 if UNITS[kind] in (1, 16, 32, 64, 96, 256) else 960
    call = stored_call(kind, Routing(tokens, experts, 1), size, size, torch.bfloat16)
    counted = simulator.counted(lambda: moe_ops.moe_ffn_quantized(**call), "ld_bytes")
    slots = slots_of_experts(call).tolist()
    touched = sum(rows > 0 for rows in slots)
    # sort_by_expert and unpermute.
    loads = 2 * 4 * tokens + tokens * size * 2 + -(-size * 2 // 1024) * 12 * tokens
    how = parse_format(kind)
    warps = 4 if how.name in ("nvfp4", "q4_k", "q6_k") else 8
    for tiles, gathered in ((2 * size // 32, True), (size // 32, False)):
        # x, once per block, 8 rows at a time; the maps of a warp's rows.
        loads += touched * tiles * (8 * size * 2 + (warps * 32 * 4 if gathered else 0))
        # Five offsets per lane for the expert, and where its rows are.
        searched = touched + min(experts, tokens) - touched
        loads += tiles * warps * (searched * 640 + touched * 256)
    needed = touched * (stored_bytes(call, "w_gate_up") + stored_bytes(call, "w_down"))
    read = counted["ld_bytes"] - loads
    assert needed <= read <= 1.1 * needed, f"{read} bytes of {needed}"

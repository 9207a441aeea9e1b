from __future__ import annotations

import concurrent.futures

import pytest
import torch
from tests.helpers.op_case import OpCase
from tests.helpers.quantized import (
    INTEGER_ROWS,
    STORED,
    bits_of_tokens,
    check_moe_ffn_quantized,
    check_stored_ffn,
    dequantized,
    label_of,
    moe_ffn_in_integers,
    moe_ffn_quantized_magnitude,
    quantized,
    quantized_operands,
    rounds_to_bytes,
    slots_of_experts,
    stored_call,
)
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import _library, reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.quant import dequantize_weight
from moe_ops.testing import (
    as_strided_copy,
    assert_identical,
    check_against_reference,
    eps,
    poisoned,
    short,
)


def quantized_call(s):
    call = s.ffn()
    if s.dtype == torch.float64:
        for name in ("x", "b_gate_up", "b_down"):
            call[name] = call[name].float()
    for name in ("w_gate_up", "w_down"):
        call[f"{name}_scale"] = torch.rand(call[name].shape[:2])
        call[name] = torch.randint(-127, 128, call[name].shape).to(torch.int8)
    call["x_scale"] = torch.rand(s.h)
    call["format"] = "int8"
    return call


OP_CASES = {
    "moe_ffn_quantized": OpCase(
        quantized_call,
        bad_arguments={"activation": ("", "swish", "SWIGLU", "swiglu\0")},
        mixed_floats=("topk_weights",),
        kind="quantized",
    )
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 8 bits, and 4 bits with each size of a group.
FORMATS = ((8, 0), (4, 32), (4, 64), (4, 128))
NAMES = ("int8", "int4 g32", "int4 g64", "int4 g128")
# Every expert few tokens, so products of integers; every expert many, so tiles, on widened weights
# where tokens are float32.
FEW = Routing(7, 4, 2, "dropped")
MANY = Routing(31, 2, 2)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Unless a test asks for more. OpenMP's threads spin at the end of each of the thousands of
    small products of the reference: 10 s become minutes where another process wants the core."""
    set_threads(1)


@pytest.fixture(autouse=True)
def kernels(backend, monkeypatch):
    """On CUDA tokens are not rounded to integers, so there is one check for all of them."""
    if backend != "cpu":
        monkeypatch.setitem(globals(), "check", check_moe_ffn_quantized)


formats = pytest.mark.parametrize("bits_group", FORMATS, ids=NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def check_integers(call):
    """Against the same rounding of tokens in fp64. Sums in another order may turn a token's feature
    that lies between two integers to the other one; that is worth 1e-3 at the most here, where the
    rounding as a whole is worth 5e-3."""
    expected = moe_ffn_in_integers(call)
    with poisoned(call["x"], expected.to(call["x"].dtype)):
        y = moe_ops.moe_ffn_quantized(**call)
    assert y.dtype == call["x"].dtype
    assert y.shape == expected.shape
    error, norm = (y.double() - expected).norm(), expected.norm()
    # Half types often lie at half an integer, which a level without fused multiply-adds may miss.
    other = 5e-3 if _library.cpu_isa() == "portable" and y.dtype != torch.float32 else 1e-3
    if not rounds_to_bytes(call):
        # Each value off by up to 1.5e-5 of the largest of its row, some 3 to 7 usual ones.
        other = 1e-4
    assert error <= (eps(y.dtype) + other) * norm + 1e-30, f"{error:.2e} of {norm:.2e}"


def check_widened(call):
    rows = call["topk_ids"].numel()
    sizes = (*call["x"].shape, call["w_down"].shape[-1] * 2, rows, 1)
    bf16 = call["x"].dtype == torch.bfloat16
    check_against_reference(
        moe_ops.moe_ffn_quantized,
        reference.moe_ffn_quantized,
        call,
        magnitude=moe_ffn_quantized_magnitude,
        sum_length=max(sizes),
        # The allowance for x * x_scale and h in bfloat16 also holds what integers of 16 bits differ
        # by; that of float16 is as it is without.
        steps=3 if bf16 else 0,
    )


def check(call):
    """Whichever way the experts go."""
    if bits_of_tokens(call) == {0}:
        return check_widened(call)
    check_integers(call)


def sizes_of(bits, group):
    """(H, I) below, at and above the vectors and blocks of every instruction set."""
    if bits == 8:
        return ((1, 1), (3, 7), (16, 24), (33, 65), (64, 32), (65, 33), (129, 64), (193, 100))
    return tuple((a * group, b * group) for a, b in ((1, 1), (2, 1), (1, 3), (3, 2), (4, 5)))


CASES = [(f, size) for f in FORMATS for size in sizes_of(*f)]


@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
@dtypes
@pytest.mark.parametrize(("bits_group", "size"), CASES, ids=str)
def test_sizes(bits_group, size, dtype, routing):
    check(quantized_operands(routing, *size, dtype, *bits_group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("bits_group", [(8, 0), (4, 64)], ids=["int8", "int4 g64"])
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing, bits_group, dtype):
    check(quantized_operands(routing, 64, 128, dtype, *bits_group, bias=True))


@pytest.mark.parametrize("tokens", range(1, INTEGER_ROWS + 8))
@dtypes
@formats
def test_rows_of_an_expert(bits_group, dtype, tokens):
    """Every number of tokens that a kernel takes at once, and both sides of the last."""
    call = quantized_operands(Routing(tokens, 1, 1), 1152, 128, dtype, *bits_group)
    assert int(slots_of_experts(call)) == tokens
    check(call)


@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
@formats
@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
def test_activations(activation, bits_group, routing):
    check(
        quantized_operands(
            routing, 128, 128, torch.float32, *bits_group, activation=activation, bias=True
        )
    )


@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("x_scale", [False, True], ids=["", "x_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(
    "bits_group", [(8, 0), (4, 32), (4, 128)], ids=["int8", "int4 g32", "int4 g128"]
)
def test_options(bits_group, dtype, x_scale, interleaved, on_input, routing):
    call = quantized_operands(
        routing, 128, 256, dtype, *bits_group, activation="swiglu_oai", bias=True, x_scale=x_scale
    )
    call |= {"interleaved": interleaved, "apply_router_weight_on_input": on_input}
    check({**call, "alpha": 1.3, "limit": 0.8})


@pytest.mark.parametrize("tokens", [3, pytest.param(160, marks=pytest.mark.slow_on_simulator)])
@dtypes
@formats
def test_more_than_one_block_in_every_direction(bits_group, dtype, tokens):
    call = quantized_operands(
        Routing(tokens, 2, 2), 640, 512, dtype, *bits_group, bias=True, x_scale=True
    )
    check(call)


def test_formats_may_differ():
    call = quantized_operands(FEW, 128, 96, torch.float32, 8)
    four = quantized_operands(FEW, 128, 96, torch.float32, 4, 32)
    for name, format in (("w_down", ("int8", "int4 g32")), ("w_gate_up", "int4 g32, int8")):
        own = {part: four[part] for part in (name, f"{name}_scale")}
        check({**call, **own, "format": format})


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(0, 32), (32, 0), (0, 0)])
def test_empty_sizes(hidden_size, intermediate_size, bits):
    call = quantized_operands(FEW, hidden_size, intermediate_size, torch.float32, bits, bias=True)
    y, expected = moe_ops.moe_ffn_quantized(**call), reference.moe_ffn_quantized(**call)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("view", ["transposed", "offset", "step2", "step2_last"])
@pytest.mark.parametrize(
    "name", ["x", "w_gate_up", "w_gate_up_scale", "w_down", "w_down_scale", "topk_weights"]
)
@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
@formats
def test_views(bits_group, routing, name, view):
    call = quantized_operands(routing, 128, 128, torch.float32, *bits_group)
    want = moe_ops.moe_ffn_quantized(**call)
    call[name] = as_strided_copy(call[name], view)
    assert_identical(moe_ops.moe_ffn_quantized(**call), want)


# --- the arithmetic


@formats
@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
def test_extreme_codes(routing, bits_group):
    """Largest integers of one sign everywhere: no intermediate sum of any width overflows."""
    bits, group = bits_group
    call = quantized_operands(routing, 256, 256, torch.float32, bits, group, activation="relu")
    call["x"] = torch.ones_like(call["x"])
    for name in ("w_gate_up", "w_down"):
        for code in (-127, 127) if bits == 8 else (0x00, 0xFF):
            changed = {**call, name: torch.full_like(call[name], code)}
            check(changed)
            check({**changed, "x": -changed["x"]})


def test_a_code_of_minus_128_counts_as_it_is():
    call = quantized_operands(FEW, 128, 128, torch.float32, 8)
    call["w_gate_up"][:, ::3, ::2] = -128
    check(call)


@pytest.mark.cpu_only
@pytest.mark.parametrize("tokens", [6, 60])
@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_error_of_rounded_tokens(bits_group, dtype, tokens):
    """Bounds the error against tokens as they are, element by element: a rounded value is off by at
    most 1/254 of the largest of its block, or 1/65278 of the largest of its row."""
    call = quantized_operands(Routing(tokens, 3, 2), 512, 256, dtype, *bits_group)
    assert bool((slots_of_experts(call) <= INTEGER_ROWS).all()) == (tokens == 6)
    in_bytes = rounds_to_bytes(call)
    exact = dequantized(call)
    expected = reference.moe_ffn(**exact)
    offsets, row_to_slot, slot_to_row = reference.sort_by_expert(call["topk_ids"], 3)

    def step(rows):
        if not in_bytes:
            return (rows.abs().amax(1, keepdim=True) / 65278).expand_as(rows)
        most = rows.abs().unflatten(1, (-1, 32)).amax(2, keepdim=True)
        return (most / 254).expand(-1, -1, 32).flatten(1)

    rows = reference.permute(exact["x"], offsets, row_to_slot)
    preact = reference.grouped_gemm(rows, exact["w_gate_up"], offsets)
    error = reference.grouped_gemm(step(rows), exact["w_gate_up"].abs(), offsets)
    (gate, up), (gate_error, up_error) = preact.chunk(2, 1), error.chunk(2, 1)
    silu = gate * gate.sigmoid()  # Its slope is at most 1.1.
    h_error = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error
    h_error = h_error + step((silu * up).abs() + h_error)
    out_error = reference.grouped_gemm(h_error, exact["w_down"].abs(), offsets)
    bound = reference.unpermute(out_error, offsets, slot_to_row, exact["topk_weights"])
    y = moe_ops.moe_ffn_quantized(**call).double()
    assert bool(((y - expected).abs() <= bound + 2 * eps(dtype) * expected.abs()).all())
    # Errors have any sign, so the whole is much smaller than the bound.
    usual = 0.015 if in_bytes else 1e-4
    assert (y - expected).norm() <= (2 * eps(dtype) + usual) * expected.norm()


@pytest.mark.parametrize("tokens", [2, 30])
@pytest.mark.parametrize("sizes", [(4230, 64), (64, 8300)], ids=str)
def test_long_sums_of_the_largest_integers(sizes, tokens):
    """8 bits: longer than 32 bits hold the sum of, all of one sign."""
    call = quantized_operands(Routing(tokens, 1, 1), *sizes, torch.bfloat16, 8, activation="relu")
    call["x"] = torch.ones_like(call["x"])
    check({**call, "w_gate_up": torch.full_like(call["w_gate_up"], 127)})
    for code in (-128, 127):
        check({**call, "w_gate_up": call["w_gate_up"].abs(), "w_down": call["w_down"] * 0 + code})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
@dtypes
@formats
def test_a_token_that_is_not_finite(bits_group, dtype, routing, value):
    """It spoils its own output and no other."""
    call = quantized_operands(routing, 256, 128, dtype, *bits_group)
    call["topk_ids"][2, 0] = 0
    want = moe_ops.moe_ffn_quantized(**call)
    call["x"][2, 70] = value
    y = moe_ops.moe_ffn_quantized(**call)
    assert y[2].isnan().all()
    others = torch.arange(len(y)) != 2
    assert_identical(y[others], want[others])


def test_a_token_of_zeros():
    for bits in (8, 4):
        call = quantized_operands(FEW, 128, 128, torch.float32, bits)
        call["x"][3] = 0
        assert moe_ops.moe_ffn_quantized(**call)[3].eq(0).all()


def test_experts_without_tokens_are_not_read():
    for bits in (8, 4):
        call = quantized_operands(Routing(9, 4, 2, "one_expert"), 64, 64, torch.float32, bits)
        for name in ("w_gate_up_scale", "w_down_scale"):
            call[name][[0, 1, 3]] = torch.nan
        assert moe_ops.moe_ffn_quantized(**call).isfinite().all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["skewed", "dropped", "one_expert"])
@dtypes
@formats
def test_same_bits_for_any_thread_count(bits_group, dtype, kind, set_threads):
    call = quantized_operands(Routing(50, 8, 2, kind), 256, 384, dtype, *bits_group, bias=True)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        runs.append(moe_ops.moe_ffn_quantized(**call))
    for run in runs[1:]:
        assert_identical(run, runs[0])


@pytest.mark.cpu_only
def test_two_python_threads_at_once():
    calls = [
        quantized_operands(Routing(20, 4, 2), 128, 128, torch.bfloat16, bits)
        for bits in (8, 4, 8, 4)
    ]
    want = [moe_ops.moe_ffn_quantized(**call) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: moe_ops.moe_ffn_quantized(**calls[i % 4]), range(40)))
    for i, y in enumerate(got):
        assert_identical(y, want[i % 4], f"call {i}")


# --- formats that are decoded to float32 (tests/quant/test_stored_formats.py has their gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("kind", STORED)
def test_stored_formats(kind, routing, dtype, backend):
    check = check_moe_ffn_quantized if backend == "sim" else check_stored_ffn
    check(stored_call(kind, routing, 256, 256, dtype, bias=True, x_scale=True))


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", STORED)
def test_stored_formats_without_tokens(kind):
    call = stored_call(kind, Routing(1, 2, 1), 256, 256, torch.float32)
    for name in ("x", "topk_weights", "topk_ids"):
        call[name] = call[name][:0]
    assert moe_ops.moe_ffn_quantized(**call).shape == (0, 256)


# --- torch


def positional(call):
    names = (
        "x",
        "w_gate_up",
        "w_gate_up_scale",
        "w_down",
        "w_down_scale",
        "topk_weights",
        "topk_ids",
        "format",
        "x_scale",
    )
    keywords = {k: v for k, v in call.items() if k not in names}
    return tuple(call[name] for name in names), keywords


@formats
def test_opcheck(bits_group):
    call = quantized_operands(
        Routing(5, 3, 2, "dropped"), 128, 128, torch.float32, *bits_group, bias=True, x_scale=True
    )
    args, kwargs = positional(call)
    torch.library.opcheck(torch.ops.moe_ops.moe_ffn_quantized.default, args, kwargs)


@pytest.mark.parametrize("name", ["w_down_scale", "x_scale", "b_down"])
def test_no_gradient_of_what_is_frozen(name):
    call = quantized_operands(FEW, 64, 64, torch.float32, 8, bias=True, x_scale=True)
    want = moe_ops.moe_ffn_quantized(**call)
    call[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"moe_ffn_quantized: .*{name}"):
        moe_ops.moe_ffn_quantized(**call)
    with torch.no_grad():
        assert_identical(moe_ops.moe_ffn_quantized(**call), want)
    reference.moe_ffn_quantized(**call).sum().backward()
    assert call[name].grad.isfinite().all()


def test_compile():
    call = quantized_operands(FEW, 64, 64, torch.float32, 4, bias=True)
    compiled = torch.compile(moe_ops.moe_ffn_quantized, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(**call), moe_ops.moe_ffn_quantized(**call))


def test_autocast():
    call = quantized_operands(FEW, 64, 64, torch.float32, 8, bias=True, x_scale=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = moe_ops.moe_ffn_quantized(**call)
    half = {k: v.bfloat16() if k in ("x", "b_gate_up", "b_down") else v for k, v in call.items()}
    assert_identical(y, moe_ops.moe_ffn_quantized(**half))


def test_inference_mode():
    call = quantized_operands(FEW, 64, 64, torch.float32, 8)
    want = moe_ops.moe_ffn_quantized(**call)
    with torch.inference_mode():
        assert_identical(moe_ops.moe_ffn_quantized(**call), want)


# --- bad input


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(6)}, "x", "[6]"),
        ({"x": torch.zeros(6, 64, dtype=torch.float64)}, "x", "float64"),
        ({"x": torch.zeros(6, 32)}, "w_gate_up", "64"),
        ({"w_gate_up": torch.zeros(4, 128, 64)}, "w_gate_up", "float32"),
        ({"w_gate_up": torch.zeros(4, 127, 64).char()}, "w_gate_up_scale", "[4, 128]"),
        ({"w_gate_up_scale": torch.zeros(4, 128).half()}, "w_gate_up_scale", "float16"),
        ({"w_gate_up_scale": torch.zeros(4, 128, 3)}, "w_gate_up_scale", "[4, 128, 3]"),
        ({"format": ["int8", "int8", "int8"]}, "format", "int8, int8, int8"),
        ({"w_down": torch.zeros(4, 64, 63).char()}, "w_down", "63"),
        ({"w_down": torch.zeros(4, 64, 32).byte()}, "w_down", "uint8 of shape [4, 64, 32]"),
        ({"w_down_scale": torch.zeros(4, 63)}, "w_down_scale", "[4, 63]"),
        ({"w_down_scale": torch.zeros(3, 64)}, "w_down_scale", "[3, 64]"),
        ({"topk_ids": torch.zeros(6, 2)}, "topk_ids", "float32"),
        ({"topk_weights": torch.zeros(6, 3)}, "topk_weights", "[6, 3]"),
        ({"x_scale": torch.zeros(63)}, "x_scale", "[63]"),
        ({"x_scale": torch.zeros(64).half()}, "x_scale", "float16"),
        ({"b_down": torch.zeros(4, 64).half()}, "b_down", "float16"),
        ({"activation": "swish"}, "activation", "swish"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input(change, name, got, device, bad_input):
    call = {**quantized_operands(Routing(6, 4, 2), 64, 64, torch.float32, 8), **change}
    if device == "meta":
        call = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with bad_input("moe_ffn_quantized", name, got):
        moe_ops.moe_ffn_quantized(**call)


@pytest.mark.parametrize("format", ["int4 g64", "int4 g160", "int4 g32 bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scales_of_other_groups(format, device, bad_input):
    """Scales of 32 weights each; the name decides whether that is right."""
    call = quantized_operands(Routing(6, 4, 2), 160, 160, torch.float32, 4, 32)
    call = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    name, got = ("w_down", "[4, 160, 80]") if "64" in format else ("w_down_scale", "[4, 160, 5]")
    with bad_input("moe_ffn_quantized", name, got):
        moe_ops.moe_ffn_quantized(**call | {"format": ("int4 g32", format)})


def test_quantizing_is_nearest():
    """The helper of these tests: half a step is the most that a weight moves."""
    w = torch.randn(2, 5, 64)
    for bits, group in FORMATS[:3]:
        codes, scale = quantized(w, bits, group)
        back = dequantize_weight(codes, scale, label_of(bits, group))
        step = scale[..., None] if bits == 8 else scale.repeat_interleave(group, 2)
        assert bool(((back - w).abs() <= 0.501 * step).all())

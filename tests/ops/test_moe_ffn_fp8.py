from __future__ import annotations

import concurrent.futures

import pytest
import torch
from tests.helpers.fp8 import check_moe_ffn_fp8, fp8_operands
from tests.helpers.op_case import OpCase
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.quant import dequantize_fp8_blocks
from moe_ops.testing import as_strided_copy, assert_identical, eps, poisoned, short


def two_blocks(s):
    h, i = 128 + s.h, 128 + s.i
    call = {"x": s.narrow(s.t, h)}
    for name, out, depth in (("w_gate_up", 2 * i, h), ("w_down", h, i)):
        call[name] = torch.randn(s.e, out, depth).to(torch.float8_e4m3fn)
        call[f"{name}_scale"] = torch.rand(s.e, -(-out // 128), -(-depth // 128))
        call["b" + name[1:]] = call["x"].new_ones(s.e, out)
    return {**call, "topk_weights": s.weights(), "topk_ids": s.ids()}


OP_CASES = {
    "moe_ffn_fp8": OpCase(
        two_blocks,
        bad_arguments={"activation": ("", "swish", "SWIGLU", "swiglu\0")},
        mixed_floats=("topk_weights",),
        kind="quantized",
    )
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)
# Every expert few tokens; every expert many.
FEW = Routing(6, 4, 2, "dropped")
MANY = Routing(40, 2, 2)
routings = pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
# (H, I) around vectors and blocks of 128.
SIZES = (
    (1, 1),
    (3, 7),
    (16, 24),
    (33, 129),
    (64, 32),
    (128, 128),
    (129, 100),
    (200, 257),
    (300, 384),
)


@pytest.fixture
def check(backend):
    # CUDA kernels keep the rows of the down projection in x's dtype.
    return lambda call: check_moe_ffn_fp8(call, row_steps=0 if backend == "cpu" else 1)


@routings
@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype, routing, check):
    check(fp8_operands(routing, *size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing, dtype, check):
    check(fp8_operands(routing, 140, 130, dtype, bias=True))


@routings
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
def test_activations(activation, interleaved, routing, check):
    call = fp8_operands(routing, 130, 150, torch.float32, activation=activation, bias=True)
    check({**call, "interleaved": interleaved})


@routings
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_options(dtype, interleaved, on_input, routing, check):
    call = fp8_operands(routing, 200, 260, dtype, activation="swiglu_oai", bias=True)
    call |= {"interleaved": interleaved, "apply_router_weight_on_input": on_input}
    check({**call, "alpha": 1.3, "limit": 0.8})


@pytest.mark.parametrize("tokens", [3, 160])
@dtypes
def test_more_than_one_block_in_every_direction(dtype, tokens, check):
    check(fp8_operands(Routing(tokens, 2, 2), 640, 530, dtype, bias=True))


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(0, 32), (32, 0), (0, 0)])
def test_empty_sizes(hidden_size, intermediate_size):
    call = fp8_operands(FEW, hidden_size, intermediate_size, torch.float32, bias=True)
    torch.testing.assert_close(moe_ops.moe_ffn_fp8(**call), reference.moe_ffn_fp8(**call))


@pytest.mark.parametrize("view", ["transposed", "offset", "step2", "step2_last"])
@pytest.mark.parametrize(
    "name",
    ["x", "w_gate_up", "w_gate_up_scale", "w_down", "w_down_scale", "topk_weights", "topk_ids"],
)
@routings
def test_views(routing, name, view, backend, check):
    call = fp8_operands(routing, 144, 160, torch.float32)
    want = moe_ops.moe_ffn_fp8(**call)
    call[name] = as_strided_copy(call[name], view)
    got = check(call)
    # On CUDA, codes that start on 16 bytes have kernels of their own, which sum in another order.
    if backend == "cpu" or view != "offset" or name not in ("w_gate_up", "w_down"):
        assert_identical(got, want)


# --- the arithmetic


@routings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_error_of_rounded_tokens(dtype, routing):
    """Rounding x and h to e4m3 costs about 3 % against the same weights in fp64."""
    call = fp8_operands(routing, 512, 256, dtype)
    exact = {
        k: v.double() if v.is_floating_point() else v for k, v in call.items() if k != "activation"
    }
    for name in ("w_gate_up", "w_down"):
        exact.pop(f"{name}_scale")
        exact[name] = dequantize_fp8_blocks(call[name], call[f"{name}_scale"], torch.float64)
    expected = reference.moe_ffn(**exact)
    y = moe_ops.moe_ffn_fp8(**call).double()
    assert (
        0.005 * expected.norm()
        <= (y - expected).norm()
        <= (2 * eps(dtype) + 0.05) * expected.norm()
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@routings
def test_a_token_that_is_not_finite(routing, value):
    """It spoils its own output and no other."""
    call = fp8_operands(routing, 256, 128, torch.float32)
    call["topk_ids"][2, 0] = 0
    want = moe_ops.moe_ffn_fp8(**call)
    call["x"][2, 70] = value
    y = moe_ops.moe_ffn_fp8(**call)
    assert y[2].isnan().all()
    others = torch.arange(len(y)) != 2
    assert_identical(y[others], want[others])


@routings
def test_a_token_of_zeros(routing):
    call = fp8_operands(routing, 128, 128, torch.float32)
    call["x"][3] = 0
    assert moe_ops.moe_ffn_fp8(**call)[3].eq(0).all()


@routings
def test_scaling_x_by_a_power_of_two_scales_the_result(routing):
    """Codes stay what they are."""
    call = fp8_operands(routing, 200, 150, torch.float32, activation="relu")
    want = moe_ops.moe_ffn_fp8(**call)
    assert_identical(moe_ops.moe_ffn_fp8(**{**call, "x": call["x"] * 2.0**-20}), want * 2.0**-20)


def test_experts_without_tokens_are_not_read():
    call = fp8_operands(Routing(9, 4, 2, "one_expert"), 64, 64, torch.float32, bias=True)
    want = moe_ops.moe_ffn_fp8(**call)
    for name in ("w_gate_up", "w_gate_up_scale", "w_down", "w_down_scale", "b_down"):
        call[name][[0, 1, 3]] = torch.nan
    assert_identical(moe_ops.moe_ffn_fp8(**call), want)


def test_weights_of_slots_without_an_expert_may_be_nan():
    call = fp8_operands(Routing(12, 4, 2, "dropped"), 64, 64, torch.float32)
    want = moe_ops.moe_ffn_fp8(**call)
    call["topk_weights"][call["topk_ids"] < 0] = torch.nan
    for on_input in (False, True):
        y = moe_ops.moe_ffn_fp8(**call, apply_router_weight_on_input=on_input)
        assert bool(y.isfinite().all())
    assert_identical(moe_ops.moe_ffn_fp8(**call), want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["skewed", "dropped", "one_expert"])
@dtypes
def test_same_bits_for_any_thread_count(dtype, kind, set_threads):
    call = fp8_operands(Routing(50, 8, 2, kind), 256, 384, dtype, bias=True)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        runs.append(moe_ops.moe_ffn_fp8(**call))
    for run in runs[1:]:
        assert_identical(run, runs[0])


@pytest.mark.cpu_only
def test_two_python_threads_at_once():
    calls = [fp8_operands(Routing(t, 4, 2), 128, 128, torch.bfloat16) for t in (3, 20, 40)]
    want = [moe_ops.moe_ffn_fp8(**call) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: moe_ops.moe_ffn_fp8(**calls[i % 3]), range(30)))
    for i, y in enumerate(got):
        assert_identical(y, want[i % 3], f"call {i}")


# --- tokens that are quantized already, and the type of the result


def quantized(call, out_dtype=None):
    """The call with x as codes and scales."""
    codes, scale = moe_ops.quantize_fp8(call["x"])
    out_dtype = out_dtype or call["x"].dtype
    return {**call, "x": codes, "x_scale": scale, "out_dtype": out_dtype}


@routings
@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes_give_the_bits_of_their_tokens(size, dtype, routing):
    call = fp8_operands(routing, *size, dtype, bias=True)
    want = moe_ops.moe_ffn_fp8(**call)
    again = quantized(call)
    with poisoned(want):
        assert_identical(moe_ops.moe_ffn_fp8(**again), want)


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings_of_codes(routing, on_input):
    call = fp8_operands(routing, 140, 130, torch.bfloat16)
    call["apply_router_weight_on_input"] = on_input
    want = moe_ops.moe_ffn_fp8(**call)
    with poisoned(want):
        assert_identical(moe_ops.moe_ffn_fp8(**quantized(call)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@routings
def test_codes_against_the_reference(routing, dtype):
    """Scales that no rounding would give, and biases of another type than the result."""
    call = quantized(fp8_operands(routing, 200, 130, torch.float32, bias=True), dtype)
    call["x_scale"] = call["x_scale"] * 2 ** torch.rand(call["x_scale"].shape)
    call["b_down"] = call["b_down"].half()
    wide = {k: call[k].double() for k in ("x_scale", "topk_weights", "b_gate_up", "b_down")}
    want = reference.moe_ffn_fp8(**{**call, **wide, "out_dtype": torch.float64})
    y = moe_ops.moe_ffn_fp8(**call)
    assert y.dtype == dtype
    # Single features may take another code than in fp64.
    assert (y.double() - want).norm() <= (2 * eps(dtype) + 1e-3) * want.norm()


@routings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_out_dtype(dtype, routing):
    """The op returns what the same numbers in float32 give."""
    call = fp8_operands(routing, 200, 260, dtype, bias=True)
    wide = {k: v.float() if v.dtype == dtype else v for k, v in call.items() if k != "activation"}
    want = moe_ops.moe_ffn_fp8(**wide)
    for given in (call, quantized(call)):
        with poisoned(want):
            y = moe_ops.moe_ffn_fp8(**{**given, "out_dtype": torch.float32})
        assert_identical(y, want)
    assert_identical(moe_ops.moe_ffn_fp8(**call, out_dtype=dtype), moe_ops.moe_ffn_fp8(**call))


@pytest.mark.parametrize("view", ["transposed", "offset", "step2", "step2_last"])
@pytest.mark.parametrize("name", ["x", "x_scale"])
@routings
def test_views_of_codes(routing, name, view, backend):
    call = quantized(fp8_operands(routing, 144, 160, torch.float32))
    want = moe_ops.moe_ffn_fp8(**call)
    call[name] = as_strided_copy(call[name], view)
    got = moe_ops.moe_ffn_fp8(**call)
    if backend == "cpu" or view != "offset" or name != "x":
        assert_identical(got, want)
    else:  # Codes that start on 16 bytes have kernels of their own, which sum in another order.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


@routings
def test_codes_that_are_nan(routing):
    """A token spoils its own output and no other."""
    call = fp8_operands(routing, 256, 128, torch.float32)
    call["topk_ids"][2, 0] = 0
    want = moe_ops.moe_ffn_fp8(**call)
    for name, index in (("x", (2, 70)), ("x_scale", (2, 1))):
        changed = quantized(call)
        changed[name] = changed[name].clone()
        changed[name][index] = torch.nan
        y = moe_ops.moe_ffn_fp8(**changed)
        assert y[2].isnan().all()
        others = torch.arange(len(y)) != 2
        assert_identical(y[others], want[others])


def test_opcheck_and_compile_of_codes():
    call = quantized(fp8_operands(Routing(5, 3, 2, "dropped"), 130, 70, torch.float32))
    names = ("x", "w_gate_up", "w_gate_up_scale", "w_down", "w_down_scale", "topk_weights")
    torch.library.opcheck(
        torch.ops.moe_ops.moe_ffn_fp8.default,
        (*(call[n] for n in names), call["topk_ids"]),
        {"x_scale": call["x_scale"], "out_dtype": call["out_dtype"]},
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    compiled = torch.compile(moe_ops.moe_ffn_fp8, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(**call), moe_ops.moe_ffn_fp8(**call))


def test_autocast_leaves_codes():
    call = quantized(fp8_operands(FEW, 64, 64, torch.float32))
    want = moe_ops.moe_ffn_fp8(**call)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert_identical(moe_ops.moe_ffn_fp8(**call), want)


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(6, 64)}, "x", "float32"),
        ({"x_scale": torch.zeros(6, 1).half()}, "x_scale", "float16"),
        ({"x_scale": torch.zeros(5, 1)}, "x_scale", "[5, 1]"),
        ({"x_scale": torch.zeros(6, 2)}, "x_scale", "[6, 2]"),
        ({"x_scale": torch.zeros(6)}, "x_scale", "[6]"),
        ({"out_dtype": None}, "out_dtype", "None"),
        ({"out_dtype": torch.float64}, "out_dtype", "float64"),
        ({"out_dtype": torch.float8_e4m3fn}, "out_dtype", "float8_e4m3fn"),
        ({"b_down": torch.zeros(4, 64).double()}, "b_down", "float64"),
        ({"b_down": torch.zeros(4, 63)}, "b_down", "[4, 63]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_codes(change, name, got, device, bad_input):
    call = {**quantized(fp8_operands(Routing(6, 4, 2), 64, 64, torch.float32)), **change}
    if device == "meta":
        call = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with bad_input("moe_ffn_fp8", name, got):
        moe_ops.moe_ffn_fp8(**call)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float64])
def test_bad_out_dtype(out_dtype, bad_input):
    call = fp8_operands(Routing(6, 4, 2), 64, 64, torch.bfloat16)
    with bad_input("moe_ffn_fp8", "out_dtype", str(out_dtype).removeprefix("torch.")):
        moe_ops.moe_ffn_fp8(**call, out_dtype=out_dtype)


# --- torch


def test_opcheck():
    call = fp8_operands(Routing(5, 3, 2, "dropped"), 130, 70, torch.float32, bias=True)
    names = (
        "x",
        "w_gate_up",
        "w_gate_up_scale",
        "w_down",
        "w_down_scale",
        "topk_weights",
        "topk_ids",
        "b_gate_up",
        "b_down",
    )
    # As for grouped_gemm_fp8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.moe_ops.moe_ffn_fp8.default, tuple(call[n] for n in names), test_utils=tests
    )


def test_arguments_are_left_alone():
    call = fp8_operands(MANY, 130, 70, torch.float32, bias=True)
    before = {k: v.clone() for k, v in call.items() if isinstance(v, torch.Tensor)}
    moe_ops.moe_ffn_fp8(**call)
    for name, t in before.items():
        assert_identical(call[name].float(), t.float(), name)


@pytest.mark.parametrize("name", ["x", "topk_weights", "w_down_scale", "b_down"])
def test_no_gradient(name):
    call = fp8_operands(FEW, 64, 64, torch.float32, bias=True)
    want = moe_ops.moe_ffn_fp8(**call)
    call[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"moe_ffn_fp8: .*{name} requires one"):
        moe_ops.moe_ffn_fp8(**call)
    with torch.no_grad():
        assert_identical(moe_ops.moe_ffn_fp8(**call), want)


def test_compile():
    call = fp8_operands(FEW, 64, 64, torch.float32, bias=True)
    compiled = torch.compile(moe_ops.moe_ffn_fp8, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(**call), moe_ops.moe_ffn_fp8(**call))


def test_autocast():
    call = fp8_operands(FEW, 64, 64, torch.float32, bias=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = moe_ops.moe_ffn_fp8(**call)
    half = {k: v.bfloat16() if k in ("x", "b_gate_up", "b_down") else v for k, v in call.items()}
    assert_identical(y, moe_ops.moe_ffn_fp8(**half))


def test_inference_mode():
    call = fp8_operands(FEW, 64, 64, torch.float32)
    want = moe_ops.moe_ffn_fp8(**call)
    with torch.inference_mode():
        assert_identical(moe_ops.moe_ffn_fp8(**call), want)


# --- bad input

F8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(6)}, "x", "[6]"),
        ({"x": torch.zeros(6, 64, dtype=torch.float64)}, "x", "float64"),
        ({"x": torch.zeros(6, 64).to(F8)}, "x", "float8_e4m3fn"),
        ({"x": torch.zeros(6, 32)}, "w_gate_up", "64"),
        ({"w_gate_up": torch.zeros(4, 128, 64)}, "w_gate_up", "float32"),
        ({"w_gate_up": torch.zeros(4, 127, 64).to(F8)}, "w_gate_up", "[4, 127, 64]"),
        ({"w_gate_up_scale": torch.zeros(4, 1, 1).half()}, "w_gate_up_scale", "float16"),
        ({"w_gate_up_scale": torch.zeros(4, 2, 1)}, "w_gate_up_scale", "[4, 2, 1]"),
        ({"w_gate_up_scale": torch.zeros(4, 1)}, "w_gate_up_scale", "[4, 1]"),
        ({"w_down": torch.zeros(4, 64, 63).to(F8)}, "w_down", "63"),
        ({"w_down": torch.zeros(3, 64, 64).to(F8)}, "w_down", "[3, 1, 1]"),
        ({"w_down_scale": torch.zeros(4, 1, 2)}, "w_down_scale", "[4, 1, 2]"),
        ({"w_down_scale": torch.zeros(3, 1, 1)}, "w_down_scale", "[3, 1, 1]"),
        ({"topk_ids": torch.zeros(6, 2)}, "topk_ids", "float32"),
        ({"topk_weights": torch.zeros(6, 3)}, "topk_weights", "[6, 3]"),
        ({"b_down": torch.zeros(4, 64).half()}, "b_down", "float16"),
        ({"b_gate_up": torch.zeros(4, 64)}, "b_gate_up", "[4, 64]"),
        ({"activation": "swish"}, "activation", "swish"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input(change, name, got, device, bad_input):
    call = {**fp8_operands(Routing(6, 4, 2), 64, 64, torch.float32), **change}
    if name == "w_down" and "w_down_scale" not in change and got.startswith("[3"):
        call["w_down_scale"] = torch.zeros(3, 1, 1)
        got = "[3, 64, 64]"
    if device == "meta":
        call = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with bad_input("moe_ffn_fp8", name, got):
        moe_ops.moe_ffn_fp8(**call)

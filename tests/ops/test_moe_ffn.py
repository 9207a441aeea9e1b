"""moe_ffn. The file is long because the op has many options, layouts and rules, and an op has one
file of tests (test_layout.py).
"""

from __future__ import annotations

import concurrent.futures

import pytest
import torch
import torch.utils.checkpoint
from tests.helpers.ffn import FFN_FLOATS, check_moe_ffn, differentiable, ffn_operands
from tests.helpers.op_case import OpCase, map_of, ones
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.testing import DTYPES, VIEWS, as_strided_copy, assert_identical, short

OP_CASES = {
    "moe_ffn": OpCase(
        lambda s: s.ffn(),
        bad_arguments={"activation": ("", "swish", "SWIGLU")},
        mixed_floats=("topk_weights",),
        too_many_bytes=lambda: moe_ops.moe_ffn(
            torch.empty(2**20, 0, requires_grad=True),
            torch.empty(1, 2**43, 0),
            torch.empty(1, 0, 2**42),
            ones(2**20, 1),
            map_of(2**20, 1),
        ),
    )
}
# (H, I)
SIZES = (
    (1, 1),
    (3, 7),
    (7, 3),
    (8, 8),
    (16, 24),
    (17, 31),
    (31, 17),
    (33, 65),
    (64, 32),
    (65, 33),
    (97, 5),
    (129, 64),
    (6, 129),
    (257, 19),
)
SMALL = Routing(11, 4, 2, "dropped")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), SIZES)
def test_sizes(hidden_size, intermediate_size, dtype):
    check_moe_ffn(ffn_operands(SMALL, hidden_size, intermediate_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing, dtype):
    check_moe_ffn(ffn_operands(routing, 9, 12, dtype, bias=True))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
def test_activations(activation, dtype, bias):
    check_moe_ffn(ffn_operands(SMALL, 17, 19, dtype, activation=activation, bias=bias))


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_options(dtype, bias, interleaved, on_input):
    call = ffn_operands(SMALL, 15, 22, dtype, activation="swiglu_oai", bias=bias)
    check_moe_ffn({**call, "interleaved": interleaved, "apply_router_weight_on_input": on_input})


@pytest.mark.parametrize(
    "routing", [ROUTINGS[3], ROUTINGS[7], ROUTINGS[12], *EMPTY_ROUTINGS], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_weight_on_input_routings(dtype, routing):
    call = ffn_operands(routing, 15, 22, dtype, bias=True)
    check_moe_ffn({**call, "apply_router_weight_on_input": True})


# Weight gradients sum an expert's rows in blocks of 192 or, of bfloat16 pairs, 384.
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("rows", [193, 385, 769])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(193, 8), (8, 97)], ids=["wide", "narrow"]
)
def test_weight_on_input_rows_in_more_than_one_block(hidden_size, intermediate_size, rows, dtype):
    call = ffn_operands(Routing(rows, 1, 1), hidden_size, intermediate_size, dtype)
    check_moe_ffn({**call, "apply_router_weight_on_input": True})


@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
def test_weight_on_input_activations(activation):
    call = ffn_operands(SMALL, 10, 9, torch.float64, activation=activation, bias=True)
    check_moe_ffn({**call, "apply_router_weight_on_input": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sizes(hidden_size, intermediate_size, dtype):
    check_moe_ffn(ffn_operands(SMALL, hidden_size, intermediate_size, dtype, bias=True))


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("activation", "interleaved"),
    [
        pytest.param("swiglu", False, id="halves"),
        pytest.param("swiglu_oai", True, id="interleaved", marks=pytest.mark.slow_on_simulator),
        pytest.param("silu", False, id="plain"),
    ],
)
def test_more_than_one_block_in_every_direction(activation, interleaved, dtype, on_input):
    routing = Routing(160, 2, 2, "skewed")
    call = ffn_operands(routing, 270, 300, dtype, activation=activation, bias=True)
    check_moe_ffn({**call, "interleaved": interleaved, "apply_router_weight_on_input": on_input})


@pytest.mark.slow_on_simulator
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_rows_of_several_ranges_of_features(dtype, on_input):
    """2 MiB hold 1024 features of 512 rows in fp32: here the last range is narrower and odd."""
    call = ffn_operands(Routing(300, 3, 2, "dropped"), 2061, 44, dtype, bias=True)
    check_moe_ffn({**call, "apply_router_weight_on_input": on_input})


@pytest.mark.slow_on_simulator
@pytest.mark.parametrize("view", ["contiguous", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(320, 208), (300, 201)])
def test_experts_of_every_number_of_rows(hidden_size, intermediate_size, dtype, view):
    """Rows of an expert decide how its weights are read: as they lie or copied, forward and
    backward, in one tile of rows or several. Depths are those of several blocks."""
    rows = [1, 2, 3, 4, 5, 8, 9, 12, 13, 14, 15, 24, 25, 28, 29, 40, 41, 129]
    call = ffn_operands(
        Routing(sum(rows), len(rows), 1), hidden_size, intermediate_size, dtype, bias=True
    )
    experts = torch.arange(len(rows), dtype=torch.int32)
    call["topk_ids"] = experts.repeat_interleave(torch.tensor(rows))[torch.randperm(sum(rows))]
    call["topk_ids"] = call["topk_ids"][:, None]
    for name in ("w_gate_up", "w_down"):
        call[name] = as_strided_copy(call[name], view)
    check_moe_ffn(call)


@pytest.mark.parametrize("alpha", [1.0, 2.5])
@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_oai_parameters(limit, alpha):
    call = ffn_operands(SMALL, 15, 22, torch.float64, activation="swiglu_oai", bias=True)
    check_moe_ffn({**call, "alpha": alpha, "limit": limit, "interleaved": True})


@pytest.mark.parametrize("one_bias", ["b_gate_up", "b_down"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_bias(dtype, one_bias):
    call = ffn_operands(SMALL, 15, 22, dtype, bias=True)
    del call[{"b_gate_up": "b_down", "b_down": "b_gate_up"}[one_bias]]
    check_moe_ffn(call)


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_weights_of_any_dtype(dtype, weights_dtype):
    call = ffn_operands(SMALL, 9, 12, dtype, weights_dtype=torch.float32)
    call["topk_weights"] = call["topk_weights"].to(weights_dtype)
    wrt = differentiable(call)
    if weights_dtype == torch.float64:
        # Computed in fp32, so its fp64 gradient cannot meet the bound of an fp64 op.
        wrt.remove("topk_weights")
    check_moe_ffn(call, wrt)


@pytest.mark.parametrize("wanted", FFN_FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_one_gradient_at_a_time(dtype, wanted):
    check_moe_ffn(ffn_operands(SMALL, 9, 12, dtype, bias=True), [wanted])


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("sizes", [(9, 12), (72, 136)], ids=str)  # of 16 bytes per row, or not
def test_small_float16_gradients(sizes, activation, on_input):
    """Gradients on the way may be kept in float16, whose values below 2^-14 are 2^-24 apart. That
    moves u = w_down^T grad_y, the gradients of the pre-activation and those of x by rows by 2^-25
    each, and the result by no more than follows; flushing small values to zero would move it by
    2^-14."""
    call = ffn_operands(Routing(40, 3, 2, "dropped"), *sizes, torch.float16, activation=activation)
    call["apply_router_weight_on_input"] = on_input
    wide = {k: v.double() if k in FFN_FLOATS else v for k, v in call.items()}
    grad_y = (2.0**-18 * torch.randn(call["x"].shape)).half()
    x = call["x"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(moe_ops.moe_ffn(**{**call, "x": x}), x, grad_y)
    x = wide["x"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.moe_ffn(**{**wide, "x": x}), x, grad_y.double())

    # Of each token: what its experts' rows add up to.
    half_step = 2.0**-25
    bound = torch.full_like(expected, half_step)
    scale = torch.zeros_like(expected)
    for token, experts in enumerate(call["topk_ids"].tolist()):
        for slot, e in enumerate(experts):
            if e < 0:
                continue
            weight = wide["topk_weights"][token, slot]
            row = wide["x"][token] * (weight if on_input else 1)
            preact = (wide["w_gate_up"][e] @ row).requires_grad_()
            h = reference.gated_act(preact[None], activation)
            u = wide["w_down"][e].T.abs() @ grad_y[token].double().abs()
            out, into = (1, weight) if on_input else (weight, 1)
            slopes = [
                torch.autograd.grad(h, preact, g[None], retain_graph=True)[0].abs()
                for g in (torch.ones_like(u), u)
            ]
            moved = half_step * (1 + out * slopes[0])
            bound[token] += into * (half_step + moved @ wide["w_gate_up"][e].abs())
            scale[token] += into * out * (slopes[1] @ wide["w_gate_up"][e].abs())
    # Beside them the roundings of values that are not small: u, the slopes (of a pre-activation
    # that was rounded), their products, rows and result.
    bound += 8 * torch.finfo(torch.float16).eps * scale
    assert bool((bound < 2.0**-14).all())
    assert bool(((grad.double() - expected).abs() <= bound).all())
    assert bool((grad != 0).any(1)[(call["topk_ids"] >= 0).any(1)].all())


# --- the result in the type of the sums

HALF = (torch.bfloat16, torch.float16)


def in_sums_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(17, 31), (64, 32), (257, 19)])
def test_out_dtype(hidden_size, intermediate_size, dtype, on_input):
    call = ffn_operands(SMALL, hidden_size, intermediate_size, dtype, bias=True)
    call["apply_router_weight_on_input"] = on_input
    check_moe_ffn(call, out_dtype=in_sums_dtype(dtype))
    check_moe_ffn(call, out_dtype=dtype)


@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_out_dtype_of_routings(routing):
    check_moe_ffn(ffn_operands(routing, 9, 12, torch.bfloat16), out_dtype=torch.float32)


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("routing", [SMALL, Routing(700, 4, 2, "dropped")], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_the_sum_is_rounded_once(dtype, routing, on_input):
    """In float32 it is what is rounded without out_dtype, and gradients have bitwise identical
    results."""
    call = ffn_operands(routing, 40, 24, dtype, bias=True)
    call["apply_router_weight_on_input"] = on_input
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    want, wide = moe_ops.moe_ffn(**call), moe_ops.moe_ffn(**call, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert not torch.equal(wide, wide.to(dtype).float())
    assert_identical(wide.to(dtype), want)
    grad = torch.randn(want.shape).to(dtype)
    for a, b in zip(
        torch.autograd.grad(wide, leaves, grad.float()),
        torch.autograd.grad(want, leaves, grad),
        strict=True,
    ):
        assert_identical(a, b, "gradient")
    with torch.no_grad():
        assert_identical(moe_ops.moe_ffn(**call, out_dtype=torch.float32), wide.detach())


@pytest.mark.cpu_only
def test_small_float16_gradients_in_float32():
    """Not rounded to float16 on the way in, where they would be zero."""
    call = ffn_operands(SMALL, 9, 12, torch.float16)
    weights = call["topk_weights"].requires_grad_()
    y = moe_ops.moe_ffn(**call, out_dtype=torch.float32)
    grad = 2.0**-30 * torch.randn(y.shape)
    (got,) = torch.autograd.grad(y, weights, grad)
    wide = {k: v.double() if k in FFN_FLOATS else v for k, v in call.items()}
    (want,) = torch.autograd.grad(reference.moe_ffn(**wide), weights, grad.double())
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2.0**-36)


def test_main_grads_and_out_dtype():
    call = ffn_operands(SMALL, 9, 12, torch.bfloat16)
    leaves = [call[name].requires_grad_() for name in ("w_gate_up", "w_down")]
    want = torch.autograd.grad(moe_ops.moe_ffn(**call).sum(), leaves)
    main = tuple(torch.zeros(t.shape, dtype=t.dtype) for t in leaves)
    y = moe_ops.moe_ffn(**call, main_grads=main, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    y.sum().backward()
    for a, b in zip(main, want, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck_and_compile_with_out_dtype():
    call = ffn_operands(Routing(5, 3, 2, "dropped"), 6, 7, torch.bfloat16)
    call["x"].requires_grad_()
    args, keywords = positional(call)
    keywords["out_dtype"] = torch.float32
    torch.library.opcheck(torch.ops.moe_ops.moe_ffn.default, args, keywords)
    compiled = torch.compile(moe_ops.moe_ffn, fullgraph=True, backend="aot_eager")
    got, want = (f(**call, out_dtype=torch.float32) for f in (compiled, moe_ops.moe_ffn))
    assert_identical(got, want)
    grad = torch.randn(want.shape)
    assert_identical(*(torch.autograd.grad(y, call["x"], grad)[0] for y in (got, want)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_bad_out_dtype(training, dtype, bad_input):
    call = ffn_operands(Routing(6, 4, 2), 5, 7, dtype)
    if training:
        call["w_down"].requires_grad_()
    for out_dtype in {torch.float16, torch.float64, torch.int32} - {dtype}:
        with bad_input("moe_ffn", "out_dtype", str(out_dtype).removeprefix("torch.")):
            moe_ops.moe_ffn(**call, out_dtype=out_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_inference_and_training_agree(dtype):
    call = ffn_operands(SMALL, 33, 31, dtype, bias=True)
    plain = moe_ops.moe_ffn(**call)
    call["w_down"].requires_grad_()
    trained = moe_ops.moe_ffn(**call)
    assert trained.requires_grad
    assert_identical(trained.detach(), plain)


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("name", FFN_FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_views(dtype, name, view):
    call = ffn_operands(SMALL, 11, 14, dtype, bias=True)
    call[name] = as_strided_copy(call[name], view)
    check_moe_ffn(call, grad_view=view)


@pytest.mark.parametrize("view", ["transposed", "step2", "step2_last", "offset", "expanded"])
def test_id_views(view):
    call = ffn_operands(SMALL, 11, 14, torch.float32)
    call["topk_ids"] = as_strided_copy(call["topk_ids"], view)
    check_moe_ffn(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_weights_stored_transposed(dtype):
    """gpt-oss stores [E, H, 2I] and [E, I, H]: a transposed view costs no copy by the caller."""
    call = ffn_operands(SMALL, 17, 20, dtype, activation="swiglu_oai", bias=True)
    for name in ("w_gate_up", "w_down"):
        call[name] = as_strided_copy(call[name], "transposed")
    check_moe_ffn({**call, "interleaved": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_dropped_token_is_zero_and_its_nan_stays_out(dtype):
    call = ffn_operands(Routing(9, 3, 2), 8, 10, dtype, bias=True)
    call["topk_ids"][4] = -1
    call["x"][4] = torch.nan
    call["topk_weights"][4] = torch.nan
    names = differentiable(call)
    leaves = [call[name].requires_grad_() for name in names]
    y = moe_ops.moe_ffn(**call)
    assert bool((y[4] == 0).all())
    assert not y.isnan().any()
    grads = dict(zip(names, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True))
    assert not any(g.isnan().any() for g in grads.values())
    assert bool((grads["x"][4] == 0).all())
    assert bool((grads["topk_weights"][4] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_empty_expert_has_zero_gradient(dtype):
    call = ffn_operands(Routing(9, 4, 2, "one_expert"), 8, 10, dtype, bias=True)
    names = [name for name in differentiable(call) if name[0] in "wb"]
    for name in names:
        call[name][0] = torch.nan
    leaves = [call[name].requires_grad_() for name in names]
    for grad in torch.autograd.grad(moe_ops.moe_ffn(**call).sum(), leaves):
        assert bool((grad[[0, 1, 3]] == 0).all())
        assert bool((grad[2] != 0).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_stays_in_its_token(dtype):
    call = ffn_operands(Routing(14, 2, 1, "one_expert"), 8, 10, dtype)
    call["x"][5] = torch.nan
    y = moe_ops.moe_ffn(**call)
    where = torch.zeros(14, 8, dtype=torch.bool)
    where[5] = True
    assert_identical(y.isnan(), where)


# --- gradients added to given buffers


@pytest.mark.parametrize("routing", ["even", "dropped", "empty_experts"])
@pytest.mark.parametrize("main_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grads_are_added_to(dtype, main_dtype, routing):
    main_dtype = dtype if main_dtype is None or dtype == torch.float64 else main_dtype
    rows = Routing(40, 4, 2, "dropped")
    if routing == "empty_experts":
        rows = Routing(5, 8, 1, "dropped")
    call = ffn_operands(rows, 33, 20, dtype=dtype)
    leaves = {n: call[n].clone().requires_grad_() for n in ("x", "w_gate_up", "w_down")}
    grad_y = torch.randn_like(call["x"])
    expected = torch.autograd.grad(
        moe_ops.moe_ffn(**{**call, **leaves}), list(leaves.values()), grad_y
    )
    before = [torch.randn_like(w, dtype=main_dtype) for w in expected[1:]]
    main = tuple(b.clone() for b in before)
    moe_ops.moe_ffn(**{**call, **leaves}, main_grads=main).backward(grad_y)
    torch.testing.assert_close(leaves["x"].grad, expected[0], rtol=0, atol=0)
    assert leaves["w_gate_up"].grad is None and leaves["w_down"].grad is None
    for got, start, gradient in zip(main, before, expected[1:], strict=True):
        # One rounding of the gradient (of a half type) and one of the sum.
        bound = torch.finfo(dtype).eps * gradient.double().abs()
        bound += torch.finfo(main_dtype).eps * (start.double().abs() + gradient.double().abs())
        error = (got.double() - start.double() - gradient.double()).abs()
        subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert bool((error <= bound + subnormal).all())


def test_one_main_grad():
    call = ffn_operands(SMALL, 16, 8, torch.float32)
    leaves = {n: call[n].clone().requires_grad_() for n in ("w_gate_up", "w_down")}
    main = torch.zeros_like(call["w_down"])
    moe_ops.moe_ffn(**{**call, **leaves}, main_grads=(None, main)).sum().backward()
    expected = torch.autograd.grad(
        moe_ops.moe_ffn(**{**call, **leaves}).sum(), list(leaves.values())
    )
    assert_identical(leaves["w_gate_up"].grad, expected[0])
    assert leaves["w_down"].grad is None
    assert_identical(main, expected[1])


def test_main_grads_of_frozen_weights_are_left_alone():
    call = ffn_operands(SMALL, 16, 8, torch.float32)
    x = call["x"].clone().requires_grad_()
    main = (torch.full_like(call["w_gate_up"], 7.0), torch.full_like(call["w_down"], 7.0))
    moe_ops.moe_ffn(**{**call, "x": x}, main_grads=main).sum().backward()
    assert x.grad is not None
    assert all(bool((m == 7.0).all()) for m in main)


def test_main_grads_under_autocast_are_fp32():
    call = ffn_operands(SMALL, 16, 8, torch.float32)
    leaves = {n: call[n].clone().requires_grad_() for n in ("x", "w_gate_up", "w_down")}
    main = (torch.zeros_like(call["w_gate_up"]), torch.zeros_like(call["w_down"]))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = moe_ops.moe_ffn(**{**call, **leaves}, main_grads=main)
        expected = moe_ops.moe_ffn(**{**call, **leaves})
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(expected.float().sum(), list(leaves.values()))
    y.float().sum().backward()
    assert leaves["x"].grad.dtype == torch.float32
    for got, want in zip(main, grads[1:], strict=True):
        assert (got - want).norm() <= torch.finfo(torch.bfloat16).eps * want.norm()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 16, 17), torch.float32, "main_grad of w_gate_up must have the weight's size = 16"),
        ((4, 16, 16), torch.float64, "main_grad of w_gate_up must be float32"),
    ],
)
def test_bad_main_grads(shape, dtype, message):
    call = ffn_operands(SMALL, 16, 8, torch.float32)
    w = call["w_gate_up"].clone().requires_grad_()
    y = moe_ops.moe_ffn(
        **{**call, "w_gate_up": w}, main_grads=(torch.zeros(shape, dtype=dtype), None)
    )
    with pytest.raises(ValueError, match=message):
        y.sum().backward()


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize(
    "activation",
    [
        "swiglu",
        *(
            pytest.param(name, marks=pytest.mark.slow_on_simulator)
            for name in ("swiglu_oai", "geglu_tanh", "gelu", "relu2")
        ),
    ],
)
def test_gradcheck(activation, on_input):
    routing = Routing(4, 3, 2, "dropped")
    call = ffn_operands(routing, 3, 4, torch.float64, activation=activation, bias=True)
    call["apply_router_weight_on_input"] = on_input
    names = differentiable(call)
    inputs = tuple(call[name].requires_grad_() for name in names)

    def fn(*tensors):
        return moe_ops.moe_ffn(**{**call, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(fn, inputs)


def test_double_backward_says_so():
    call = ffn_operands(SMALL, 3, 4, torch.float64)
    x = call["x"].requires_grad_()
    y = moe_ops.moe_ffn(**call)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="moe_ffn"):
        torch.autograd.grad(grad.sum(), x)


def positional(call):
    names = ("x", "w_gate_up", "w_down", "topk_weights", "topk_ids")
    keywords = {k: v for k, v in call.items() if k not in names}
    return tuple(call[name] for name in names), keywords


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad, bias):
    call = ffn_operands(Routing(5, 3, 2, "dropped"), 6, 7, dtype, bias=bias)
    for name in differentiable(call):
        call[name].requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.moe_ffn.default, *positional(call))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck_of_the_op_that_saves(requires_grad):
    call = ffn_operands(Routing(5, 3, 2, "dropped"), 6, 7, torch.float32, bias=True)
    for name in differentiable(call):
        call[name].requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.moe_ffn_fwd.default, *positional(call))


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype, activation):
    call = ffn_operands(SMALL, 6, 7, dtype, activation=activation, bias=True)
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    compiled = torch.compile(moe_ops.moe_ffn, fullgraph=True, backend="aot_eager")
    got, want = compiled(**call), moe_ops.moe_ffn(**call)
    assert_identical(got, want)
    grad = torch.randn(want.shape).to(dtype)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(want, leaves, grad),
        strict=True,
    ):
        assert_identical(a, b, "gradient")


def test_compile_router_and_ffn_with_dynamic_tokens():
    """A whole block in one graph, and one graph for any number of tokens."""
    call = ffn_operands(Routing(12, 4, 2), 6, 7, torch.float32)
    router = torch.randn(4, 6)

    def block(x):
        weights, ids = moe_ops.topk_router(x @ router.T, 2, renormalize=True)
        return moe_ops.moe_ffn(x, call["w_gate_up"], call["w_down"], weights, ids)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_identical(compiled(call["x"]), block(call["x"]))
    more = torch.randn(29, 6)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_identical(compiled(more), block(more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_autocast_casts_like_a_linear(dtype):
    """Operands of the products are cast; the routing weights keep what the router computed."""
    call = ffn_operands(SMALL, 9, 12, dtype, bias=True)
    cast = ("x", "w_gate_up", "w_down", "b_gate_up", "b_down")
    half = {k: v.bfloat16() if k in cast else v for k, v in call.items()}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = moe_ops.moe_ffn(**call)
    assert_identical(y, moe_ops.moe_ffn(**half))


def test_autocast_gradients_keep_the_parameters_dtype():
    call = ffn_operands(SMALL, 9, 12, torch.float32, bias=True)
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = moe_ops.moe_ffn(**call)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), leaves))


def test_inference_mode():
    call = ffn_operands(SMALL, 9, 12, torch.float32, bias=True)
    want = moe_ops.moe_ffn(**call)
    with torch.inference_mode():
        assert_identical(moe_ops.moe_ffn(**call), want)


def test_no_grad_saves_nothing():
    call = ffn_operands(SMALL, 9, 12, torch.float32)
    call["w_down"].requires_grad_()
    with torch.no_grad():
        assert not moe_ops.moe_ffn(**call).requires_grad


def test_activation_checkpoint():
    """Recomputed in backward, the block gives bitwise identical results."""
    call = ffn_operands(SMALL, 9, 12, torch.float32, bias=True)
    names = differentiable(call)
    leaves = [call[name].requires_grad_() for name in names]

    def fn(*tensors):
        return moe_ops.moe_ffn(**{**call, **dict(zip(names, tensors, strict=True))})

    grad = torch.randn(11, 9)
    want = torch.autograd.grad(fn(*leaves), leaves, grad)
    y = torch.utils.checkpoint.checkpoint(fn, *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y, leaves, grad), want, strict=True):
        assert_identical(a, b, "gradient")


def test_weights_changed_between_forward_and_backward_are_noticed():
    call = ffn_operands(SMALL, 9, 12, torch.float32)
    x = call["x"].requires_grad_()
    y = moe_ops.moe_ffn(**call)
    call["w_down"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_two_python_threads_at_once(dtype):
    """Scratch memory is nobody else's: calls of other threads do not disturb a result."""
    calls = [ffn_operands(Routing(60, 4, 2), 40, 50, dtype, bias=True) for _ in range(4)]
    want = [moe_ops.moe_ffn(**call) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: moe_ops.moe_ffn(**calls[i % 4]), range(40)))
    for i, y in enumerate(got):
        assert_identical(y, want[i % 4], f"call {i}")


@pytest.mark.cpu_only
@pytest.mark.parametrize(("hidden_size", "on_input"), [(64, False), (2061, False), (2061, True)])
@pytest.mark.parametrize("kind", ["skewed", "dropped", "one_expert"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, kind, hidden_size, on_input, set_threads):
    tokens = 150 if hidden_size == 64 else 300  # enough rows for ranges of features
    call = ffn_operands(Routing(tokens, 8, 2, kind), hidden_size, 80, dtype, bias=True)
    call["apply_router_weight_on_input"] = on_input
    names = differentiable(call)
    leaves = [call[name].requires_grad_() for name in names]
    grad = torch.randn_like(call["x"])
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        y = moe_ops.moe_ffn(**call)
        runs.append((y, *torch.autograd.grad(y, leaves, grad)))
        # Frozen weights: rows of the gradient of x overwrite what others may still read.
        frozen = {
            **call,
            "w_gate_up": call["w_gate_up"].detach(),
            "w_down": call["w_down"].detach(),
        }
        (grad_x,) = torch.autograd.grad(moe_ops.moe_ffn(**frozen), [call["x"]], grad)
        assert_identical(grad_x, runs[-1][1 + names.index("x")])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("dtype", "main_dtype", "tokens"),
    [
        *((d, torch.float32, t) for d in (torch.float32, torch.bfloat16) for t in (9, 37, 130)),
        (torch.bfloat16, torch.bfloat16, 37),
        (torch.float16, torch.float32, 37),
        (torch.float64, torch.float64, 37),
    ],
    ids=lambda p: p if isinstance(p, int) else short(p),
)
def test_large_weight_gradients(dtype, main_dtype, tokens, set_threads):
    """From 8 MiB on, sums are added to memory in another order of blocks; and products whose
    weights lie along features go through items whose width depends on the number of threads."""
    call = ffn_operands(Routing(tokens, 4, 2, "dropped"), 1030, 530, dtype)
    call["w_gate_up"], call["w_down"] = call["w_gate_up"] * 0.03, call["w_down"] * 0.04
    leaves = {n: call[n].clone().requires_grad_() for n in ("x", "w_gate_up", "w_down")}
    grad_y = torch.randn_like(call["x"])
    before = [torch.randn_like(call[n], dtype=main_dtype) for n in ("w_gate_up", "w_down")]
    runs = []
    for threads in (1, 3):
        set_threads(threads)
        fresh = torch.autograd.grad(
            moe_ops.moe_ffn(**{**call, **leaves}), list(leaves.values()), grad_y
        )
        main = tuple(b.clone() for b in before)
        moe_ops.moe_ffn(**{**call, **leaves}, main_grads=main).backward(grad_y)
        runs.append((*fresh, *main))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)
    for got, start, gradient in zip(runs[0][3:], before, runs[0][1:3], strict=True):
        bound = torch.finfo(dtype).eps * gradient.double().abs()
        bound += torch.finfo(main_dtype).eps * (start.double().abs() + gradient.double().abs())
        error = (got.double() - start.double() - gradient.double()).abs()
        assert bool((error <= bound + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(6)}, "x", "[6]"),
        ({"x": torch.zeros(6, 5, 1)}, "x", "[6, 5, 1]"),
        ({"x": torch.zeros(6, 5, dtype=torch.int32)}, "x", "int32"),
        ({"w_gate_up": torch.zeros(14, 5)}, "w_gate_up", "[14, 5]"),
        ({"w_gate_up": torch.zeros(4, 14, 6)}, "w_gate_up", "6"),
        ({"w_gate_up": torch.zeros(4, 13, 5)}, "w_", ""),
        ({"w_gate_up": torch.zeros(4, 14, 5, dtype=torch.bfloat16)}, "w_gate_up", "bfloat16"),
        ({"w_down": torch.zeros(4, 5, 8)}, "w_", ""),
        ({"w_down": torch.zeros(3, 5, 7)}, "w_down", "3"),
        ({"w_down": torch.zeros(4, 6, 7)}, "w_down", "6"),
        ({"w_down": torch.zeros(4, 5, 7, dtype=torch.float64)}, "w_down", "float64"),
        ({"topk_weights": torch.zeros(6, 3)}, "topk_weights", "[6, 3]"),
        ({"topk_weights": torch.zeros(6, 2, dtype=torch.int64)}, "topk_weights", "int64"),
        ({"topk_ids": torch.zeros(7, 2, dtype=torch.int32)}, "topk_ids", "[7, 2]"),
        ({"topk_ids": torch.zeros(12, dtype=torch.int32)}, "topk_ids", "[12]"),
        ({"topk_ids": torch.zeros(6, 2)}, "topk_ids", "float32"),
        ({"topk_ids": torch.zeros(6, 2, dtype=torch.uint8)}, "topk_ids", "uint8"),
        ({"b_gate_up": torch.zeros(4, 7)}, "b_gate_up", "[4, 7]"),
        ({"b_gate_up": torch.zeros(14)}, "b_gate_up", "[14]"),
        ({"b_down": torch.zeros(3, 5)}, "b_down", "[3, 5]"),
        ({"b_down": torch.zeros(4, 5, dtype=torch.float16)}, "b_down", "float16"),
        ({"activation": "swish"}, "activation", "swish"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_bad_input(training, change, name, got, bad_input):
    call = ffn_operands(Routing(6, 4, 2), 5, 7, torch.float32, bias=True)
    if training and "w_down" not in change:
        call["w_down"].requires_grad_()
    with bad_input("moe_ffn", name, got):
        moe_ops.moe_ffn(**{**call, **change})


@pytest.mark.parametrize("name", [*FFN_FLOATS, "topk_ids"])
def test_tensor_on_another_device(name, bad_input):
    call = ffn_operands(Routing(6, 4, 2), 5, 7, torch.float32, bias=True)
    call[name] = call[name].to("meta")
    # With x on meta the first tensor on the CPU is the odd one out.
    with bad_input("moe_ffn", "w_gate_up" if name == "x" else name):
        moe_ops.moe_ffn(**call)

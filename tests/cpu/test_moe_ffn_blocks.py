"""moe_ffn of small experts, which the CPU runs in blocks of 128 tokens (cpu/moe_ffn/blocks.cpp).

Rows of at most 128 numbers, at most 2^17 weights, 16 slots per expert in a block, and for backward
48 in a chunk of two: sizes on both sides of each border, and what the operation can be asked for on
this one.
"""

from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import FFN_FLOATS, check_moe_ffn, differentiable, ffn_operands
from tests.helpers.routing import Routing

import moe_ops
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.testing import DTYPES, as_strided_copy, assert_identical, short

pytestmark = pytest.mark.cpu_only

TWO_BLOCKS = Routing(150, 4, 2, "dropped")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "activation"),
    [
        (1, 1, "swiglu"),
        (3, 7, "swiglu"),
        (16, 24, "geglu"),
        (33, 31, "swiglu"),
        (64, 64, "swiglu"),
        (128, 63, "swiglu"),
        (127, 17, "swiglu_oai"),
        (63, 128, "silu"),
        (128, 128, "relu2"),
        # Wider than a block takes.
        (129, 64, "swiglu"),
        (64, 65, "swiglu"),
        (64, 129, "silu"),
    ],
)
def test_sizes(hidden_size, intermediate_size, activation, dtype):
    call = ffn_operands(TWO_BLOCKS, hidden_size, intermediate_size, dtype, activation=activation)
    check_moe_ffn(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("tokens", [31, 32, 95, 96, 127, 128, 129, 256, 257, 700, 4200])
def test_tokens(tokens, dtype):
    """A chunk is two blocks, and three from 4097 tokens on; 31 tokens have too few slots, and 95
    for backward."""
    check_moe_ffn(ffn_operands(Routing(tokens, 4, 2, "dropped"), 9, 12, dtype, bias=True))


@pytest.mark.parametrize("num_experts", [10, 11])
def test_as_many_weights_as_stay_in_cache(num_experts):
    check_moe_ffn(ffn_operands(Routing(280, num_experts, 2), 64, 64, torch.float32))


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(300, 1, 1),
        Routing(300, 4, 2, "one_expert"),  # more rows than a product takes at once
        Routing(150, 4, 2, "half_empty"),
        Routing(250, 5, 1, "last_only"),
        Routing(150, 4, 3, "all_dropped"),
        Routing(150, 5, 2, "out_of_range", torch.int64),
        Routing(150, 4, 6, "repeated"),
        Routing(300, 8, 2, "skewed"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_routings(dtype, routing, on_input):
    call = ffn_operands(routing, 18, 21, dtype, bias=True)
    check_moe_ffn({**call, "apply_router_weight_on_input": on_input})


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
def test_activations(activation, dtype, bias):
    check_moe_ffn(ffn_operands(TWO_BLOCKS, 17, 19, dtype, activation=activation, bias=bias))


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_interleaved(dtype, bias, on_input):
    call = ffn_operands(TWO_BLOCKS, 15, 22, dtype, activation="swiglu_oai", bias=bias)
    call |= {"interleaved": True, "apply_router_weight_on_input": on_input}
    # Gradients jump at the limit, and half types may move a value across it.
    check_moe_ffn(call if dtype.itemsize == 2 else {**call, "alpha": 1.3, "limit": 0.8})


@pytest.mark.parametrize("wanted", FFN_FLOATS)
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_one_gradient_at_a_time(dtype, on_input, wanted):
    call = ffn_operands(TWO_BLOCKS, 9, 12, dtype, bias=True)
    check_moe_ffn({**call, "apply_router_weight_on_input": on_input}, [wanted])


@pytest.mark.parametrize("one_bias", ["b_gate_up", "b_down"])
def test_one_bias(one_bias):
    call = ffn_operands(TWO_BLOCKS, 15, 22, torch.float32, bias=True)
    del call[one_bias]
    check_moe_ffn(call)


@pytest.mark.parametrize("view", ["transposed", "offset", "step2", "expanded", "step2_last"])
@pytest.mark.parametrize("name", FFN_FLOATS)
def test_views(name, view):
    call = ffn_operands(TWO_BLOCKS, 11, 14, torch.float32, bias=True)
    call[name] = as_strided_copy(call[name], view)
    check_moe_ffn(call, grad_view=view)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_weights_stored_transposed(dtype):
    call = ffn_operands(TWO_BLOCKS, 17, 20, dtype, activation="swiglu_oai", bias=True)
    for name in ("w_gate_up", "w_down"):
        call[name] = as_strided_copy(call[name], "transposed")
    check_moe_ffn({**call, "interleaved": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_inference_and_training_agree(dtype):
    call = ffn_operands(TWO_BLOCKS, 33, 31, dtype, bias=True)
    plain = moe_ops.moe_ffn(**call)
    call["w_down"].requires_grad_()
    assert_identical(moe_ops.moe_ffn(**call).detach(), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_what_has_no_slots_stays_out(dtype):
    """NaN of a dropped token and of an expert without rows reaches nothing."""
    call = ffn_operands(Routing(150, 4, 2, "half_empty"), 24, 10, dtype, bias=True)
    call["topk_ids"][4] = -1
    call["x"][4] = torch.nan
    call["topk_weights"][4] = torch.nan
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        call[name][1::2] = torch.nan
    names = differentiable(call)
    leaves = [call[name].requires_grad_() for name in names]
    y = moe_ops.moe_ffn(**call)
    assert bool((y[4] == 0).all()) and not y.isnan().any()
    grads = dict(zip(names, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True))
    assert not any(g.isnan().any() for g in grads.values())
    assert bool((grads["x"][4] == 0).all()) and bool((grads["topk_weights"][4] == 0).all())
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        assert bool((grads[name][1::2] == 0).all()) and bool((grads[name][::2] != 0).any())


@pytest.mark.parametrize("kind", ["dropped", "half_empty"])
@pytest.mark.parametrize("main_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_main_grads_are_added_to(dtype, main_dtype, kind):
    main_dtype = dtype if main_dtype is None or dtype == torch.float64 else main_dtype
    call = ffn_operands(Routing(300, 4, 2, kind), 33, 20, dtype=dtype)
    leaves = {n: call[n].clone().requires_grad_() for n in ("x", "w_gate_up", "w_down")}
    grad_y = torch.randn_like(call["x"])
    expected = torch.autograd.grad(
        moe_ops.moe_ffn(**{**call, **leaves}), list(leaves.values()), grad_y
    )
    before = [torch.randn_like(w, dtype=main_dtype) for w in expected[1:]]
    for start in before:
        start[1::2] = -0.0
    main = tuple(b.clone() for b in before)
    moe_ops.moe_ffn(**{**call, **leaves}, main_grads=main).backward(grad_y)
    assert_identical(leaves["x"].grad, expected[0])
    for got, start, gradient in zip(main, before, expected[1:], strict=True):
        # One rounding of the gradient (of a half type) and one of the sum.
        bound = torch.finfo(dtype).eps * gradient.double().abs()
        bound += torch.finfo(main_dtype).eps * (start.double().abs() + gradient.double().abs())
        error = (got.double() - start.double() - gradient.double()).abs()
        subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert bool((error <= bound + subnormal).all())
        if kind == "half_empty":
            assert bool(got[1::2].signbit().all()), "an expert without rows was added to"


@pytest.mark.parametrize("tokens", [300, 4200])
@pytest.mark.parametrize("kind", ["skewed", "dropped", "one_expert"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, kind, tokens, set_threads):
    call = ffn_operands(Routing(tokens, 8, 2, kind), 48, 40, dtype, bias=True)
    leaves = [call[name].requires_grad_() for name in differentiable(call)]
    grad = torch.randn(tokens, 48).to(dtype)
    runs = []
    for threads in (1, 2, 3):
        set_threads(threads)
        y = moe_ops.moe_ffn(**call)
        runs.append((y, *torch.autograd.grad(y, leaves, grad)))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize("swapped", ["rows", "maps"])
def test_backward_takes_rows_in_any_order(swapped):
    """Blocks need the rows of an expert in the order of their slots, as sort_by_expert leaves them.
    The inner op takes other maps: rows of an expert in reverse, or maps that contradict each
    other."""
    call = ffn_operands(TWO_BLOCKS, 15, 22, torch.float32, bias=True)
    names = ("x", "w_gate_up", "w_down", "topk_weights")
    x, up, down, weights = (call[name] for name in names)
    ops = torch.ops.moe_ops
    biases = (call["b_gate_up"], call["b_down"])
    _, preact, offsets, rows, slots = ops.moe_ffn_fwd(
        x, up, down, weights, call["topk_ids"], *biases
    )
    grad_y = torch.randn_like(x)

    def backward(preact, rows, slots):
        return ops.moe_ffn_bwd(
            grad_y, x, up, down, weights, preact, offsets, rows, slots, biases[1], "swiglu",
            False, False, 1.702, 7.0, *(True,) * 6,
        )  # fmt: skip

    want = backward(preact, rows, slots)
    order = torch.arange(len(rows))
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        order[begin:end] = order[begin:end].flip(0)
    if swapped == "maps":
        # Nothing is promised but that it ends.
        backward(preact, rows.roll(7), slots)
        backward(preact, torch.zeros_like(rows), slots)
        return
    reversed_slots = torch.empty_like(slots)
    reversed_slots.view(-1)[rows[order].long()] = torch.arange(len(rows), dtype=slots.dtype)
    got = backward(preact[order], rows[order].contiguous(), reversed_slots)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

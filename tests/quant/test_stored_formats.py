"""Formats of moe_ffn_quantized without kernels of their own, and gradients through all formats."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.quantized import (
    STORED,
    bits_of_tokens,
    check_stored_ffn,
    quantized_operands,
    stored_call,
)
from tests.helpers.routing import Routing

import moe_ops
from moe_ops import reference
from moe_ops.testing import assert_identical

# Every expert few tokens, so products of integers; every expert many, so tiles.
FEW = Routing(7, 4, 2, "dropped")
MANY = Routing(31, 2, 2)


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("kind", STORED)
def test_stored_formats(kind, routing):
    """Outputs and both gradients, in fp32 to its rounding where rows are not rounded."""
    call = stored_call(kind, routing, 256, 512, torch.float32, bias=True, x_scale=True)
    check_gradients(call, 1e-5 if bits_of_tokens(call) == {0} else 0.03)


@pytest.mark.parametrize("kind", STORED)
def test_a_block_of_128_rows_in_bfloat16(kind):
    """The tiles of AMX take 96 rows at a time."""
    call = stored_call(kind, Routing(128, 1, 1), 256, 256, torch.bfloat16)
    exact = {n: t.double() if n in ("x", "topk_weights") else t for n, t in call.items()}
    wanted = reference.moe_ffn_quantized(**exact)
    assert relative(moe_ops.moe_ffn_quantized(**call), wanted) < 0.03


@pytest.mark.parametrize(
    "bits_group",
    ((8, 0), (4, 32), (4, 64), (4, 128)),
    ids=("int8", "int4 g32", "int4 g64", "int4 g128"),
)
@pytest.mark.parametrize("routing", [FEW, MANY], ids=["few", "many"])
def test_gradients(bits_group, routing):
    call = quantized_operands(
        routing, 128, 128, torch.float32, *bits_group, bias=True, x_scale=True
    )
    check_gradients(call, 0.03)  # Few rows are rounded in forward, by about 1 %.


def check_gradients(call, tolerance):
    exact = {n: t.double() if n in ("x", "topk_weights") else t for n, t in call.items()}
    results = []
    for op, arguments in ((moe_ops.moe_ffn_quantized, call), (reference.moe_ffn_quantized, exact)):
        leaves = {n: arguments[n].detach().requires_grad_() for n in ("x", "topk_weights")}
        y = op(**{**arguments, **leaves})
        grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append((y, *torch.autograd.grad(y, list(leaves.values()), grad)))
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < tolerance


@pytest.mark.parametrize("on_input", [False, True])
def test_gradients_in_bfloat16_and_of_weights_on_the_input(on_input, set_threads):
    call = stored_call("mxfp4", MANY, 64, 96, torch.bfloat16, x_scale=True)
    call |= {"apply_router_weight_on_input": on_input, "activation": "swiglu_oai"}
    call["interleaved"] = True
    check_gradients(call, 0.03)
    bits = []
    for threads in (1, 3):
        set_threads(threads)
        x = call["x"].detach().requires_grad_()
        bits.append(torch.autograd.grad(moe_ops.moe_ffn_quantized(**{**call, "x": x}).sum(), x)[0])
    assert_identical(*bits)


def test_a_format_for_each_weight():
    call = stored_call("q4_k", FEW, 256, 512, torch.float32)
    six = stored_call("q6_k", FEW, 256, 512, torch.float32)
    call |= {name: six[name] for name in ("w_down", "w_down_scale")}
    check_stored_ffn(call | {"format": ("q4_k", "q6_k")})


def test_the_formula_of_cuda():
    """Some experts dequantized at a time; here on the CPU, whose kernels say what is right."""
    from moe_ops.ops._library import cuda_formulas

    op = "moe_ffn_quantized"
    call = stored_call(
        "int4 g64 bfloat16 zero", MANY, 64, 64, torch.float32, bias=True, x_scale=True
    )
    names = (
        "x w_gate_up w_gate_up_scale w_down w_down_scale topk_weights topk_ids format x_scale "
        "b_gate_up b_down"
    ).split()
    options = (call["activation"], False, False, 1.702, 7.0)
    zeros = (call["w_gate_up_zero"], call["w_down_zero"])
    args = (*(call[n] for n in names), *options, *zeros)
    y, preact, *routing = torch.ops.moe_ops.moe_ffn_quantized_fwd(*args)
    formula_y = cuda_formulas[f"{op}_fwd"](*args)[0]
    torch.testing.assert_close(formula_y, y, rtol=1e-3, atol=1e-3)  # The kernels round tokens.
    x = call["x"] * call["x_scale"]
    saved = (x, *args[1:5], call["topk_weights"], preact, *routing)
    rest = (call["format"], call["b_gate_up"], call["b_down"], *options, *zeros, True, True)
    grads = torch.ops.moe_ops.moe_ffn_quantized_bwd(torch.ones_like(y), *saved, *rest)
    others = cuda_formulas[f"{op}_bwd"](torch.ones_like(y), *saved, *rest)
    for ours, theirs in zip(others, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_transforms_and_checks_of_torch():
    call = quantized_operands(FEW, 64, 64, torch.float32, 4, bias=True)

    def function(x):
        return moe_ops.moe_ffn_quantized(**{**call, "x": x}).sin().sum()

    x = call["x"].detach().requires_grad_()
    (wanted,) = torch.autograd.grad(function(x), x)
    assert_identical(torch.func.grad(function)(call["x"]), wanted)
    with pytest.raises(NotImplementedError, match="moe_ffn_quantized: forward-mode AD"):
        torch.func.jvp(function, (call["x"],), (call["x"],))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], wanted)
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative is not implemented"):
        grad.sum().backward()

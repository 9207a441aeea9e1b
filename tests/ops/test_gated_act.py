from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import gated_act_magnitude
from tests.helpers.op_case import OpCase

import moe_ops
from moe_ops import reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)

OP_CASES = {
    "gated_act": OpCase(
        lambda s: {"gate_up": s.float(s.t, 2 * s.i), "activation": "swiglu"},
        free_dims={"gate_up": {0}},
        bad_arguments={"activation": ("", "silu", "gelu", "SWIGLU", "swiglu\0")},
        by_token=("gate_up",),
    )
}
SIZES = (1, 3, 7, 8, 15, 17, 31, 33, 65, 97, 129, 257)
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def check(gate_up, activation, interleaved=False, **kwargs):
    arguments = {"gate_up": gate_up, "activation": activation, "interleaved": interleaved}
    views = {k: kwargs.pop(k) for k in ("grad_view",) if k in kwargs}
    check_against_reference(
        moe_ops.gated_act,
        reference.gated_act,
        {**arguments, **kwargs},
        ["gate_up"],
        magnitude=gated_act_magnitude,
        **views,
    )


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_values(activation, dtype, interleaved):
    check(3 * torch.randn(23, 2 * 37).to(dtype), activation, interleaved)


@LAYOUTS
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, activation, interleaved):
    check(torch.randn(5, 2 * size), activation, interleaved)


@LAYOUTS
@pytest.mark.parametrize("size", SIZES)
def test_sizes_bf16(size, interleaved):
    check(torch.randn(5, 2 * size).bfloat16(), "swiglu", interleaved)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (6,), (2, 3, 10), (2, 1, 3, 4), (0,)], ids=str)
def test_shapes(shape, dtype):
    check(torch.randn(shape).to(dtype), "swiglu")


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_far_from_zero(dtype, activation):
    """The value is a number, and the right one, even where exp overflows or underflows."""
    gate = torch.tensor(
        [-200.0, -104.0, -88.0, -50.0, -20.0, -9.0, -0.0, 0.0, 9.0, 20.0, 88.0, 200.0]
    )
    up = torch.tensor([1.0, -2.0, 0.5, 8.0]).repeat(3)
    check(torch.cat([gate, up])[None].to(dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    "activation", ["swiglu", "geglu", "geglu_tanh", "swiglu_oai", "swiglu_clamped"]
)
def test_fine_grid(activation, dtype):
    """Every part of the approximation of exp, tanh and erf."""
    gate = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    check(torch.cat([gate, torch.ones_like(gate)])[None].to(dtype), activation)


@LAYOUTS
@pytest.mark.parametrize("alpha", [1.0, 1.702, 0.5])
@pytest.mark.parametrize("limit", [0.75, 7.0])
def test_oai_parameters(alpha, limit, interleaved):
    gate_up = 4 * torch.randn(19, 2 * 33, dtype=torch.float64)
    for activation in ("swiglu_oai", "swiglu_clamped"):
        check(gate_up, activation, interleaved, alpha=alpha, limit=limit)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("column", [0, 5, 9, 13])
def test_nan_passes_through(column, dtype, activation):
    gate_up = torch.randn(3, 20).to(dtype)
    gate_up[1, column] = torch.nan
    h = moe_ops.gated_act(gate_up, activation)
    where = torch.zeros(3, 10, dtype=torch.bool)
    where[1, column % 10] = True
    assert_identical(h.isnan(), where)


@pytest.mark.parametrize("grad_view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
def test_views(view, grad_view):
    gate_up = as_strided_copy(torch.randn(9, 2 * 17), view)
    check(gate_up, "swiglu", grad_view=grad_view)


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=short)
def test_views_interleaved(dtype, view):
    gate_up = as_strided_copy(torch.randn(9, 2 * 17).to(dtype), view)
    check(gate_up, "swiglu_oai", True, grad_view=view)


@LAYOUTS
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gradcheck(activation, interleaved):
    gate_up = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: moe_ops.gated_act(t, activation, interleaved=interleaved), gate_up
    )


def test_double_backward_says_so():
    gate_up = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    h = moe_ops.gated_act(gate_up)
    (grad,) = torch.autograd.grad(h.sum(), gate_up, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="gated_act"):
        torch.autograd.grad(grad.sum(), gate_up)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_opcheck(activation, requires_grad):
    gate_up = torch.randn(4, 6, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.gated_act.default, (gate_up, activation))


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6)], ids=str)
def test_opcheck_shapes(shape):
    torch.library.opcheck(
        torch.ops.moe_ops.gated_act.default, (torch.randn(shape),), {"interleaved": True}
    )


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_compile(activation):
    gate_up = torch.randn(7, 34, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(moe_ops.gated_act, fullgraph=True, backend="aot_eager")
    got, want = compiled(gate_up, activation), moe_ops.gated_act(gate_up, activation)
    assert_identical(got, want)
    grad = torch.randn_like(want)
    assert_identical(*(torch.autograd.grad(h, gate_up, grad)[0] for h in (got, want)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=short)
def test_autocast_keeps_the_dtype(dtype):
    gate_up = torch.randn(5, 8).to(dtype)
    want = moe_ops.gated_act(gate_up)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert_identical(moe_ops.gated_act(gate_up), want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    gate_up = torch.randn(1500, 2 * 97).to(dtype).requires_grad_()
    grad = torch.randn(1500, 97).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        h = moe_ops.gated_act(gate_up)
        runs.append((h, torch.autograd.grad(h, gate_up, grad)[0]))
    for h, grad_gate_up in runs[1:]:
        assert_identical(h, runs[0][0])
        assert_identical(grad_gate_up, runs[0][1])


@pytest.mark.parametrize("size", [61, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_a_value_does_not_depend_on_its_place(dtype, size):
    """Four vectors at once, the vector body and the tail of a line compute bitwise identical
    results."""
    line = torch.randn(2, size).to(dtype).requires_grad_()
    whole = moe_ops.gated_act(line.reshape(1, -1))
    (grad,) = torch.autograd.grad(whole.sum(), line)
    single = torch.cat([moe_ops.gated_act(line[:, i].reshape(1, 2)) for i in range(size)], dim=1)
    (single_grad,) = torch.autograd.grad(single.sum(), line)
    assert_identical(whole, single)
    assert_identical(grad, single_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "swiglu_oai", "swiglu_clamped"])
def test_large_negative_gates_are_shut(activation, dtype):
    """The sigmoid of x is zero where x times the smallest normal number is not small."""
    most = 1e18 if activation == "geglu_tanh" else 1e38  # whose slope has x squared
    gate = torch.tensor([-most, -most / 3, -1e17, -1e4, -120.0, -most, 1.0]).repeat(22)[:150]
    gate_up = torch.stack([gate, torch.full((150,), 2.0)]).to(dtype).reshape(1, -1)
    gate_up.requires_grad_()
    h = moe_ops.gated_act(gate_up, activation)
    (grad,) = torch.autograd.grad(h.sum(), gate_up)
    shut = gate < 0
    assert h[0, shut].abs().max() < 1e-30 and h[0, ~shut].min() > 0.5
    assert grad.reshape(2, 150)[:, shut].abs().max() < 1e-30


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "swiglu_oai", "swiglu_clamped"])
@pytest.mark.parametrize("column", [0, 17, 63, 64, 127, 149])
def test_a_nan_in_a_long_row_stays_alone(column, activation):
    gate_up = torch.randn(2, 300)
    gate_up[1, column] = torch.nan
    gate_up[0, ::3] *= 100
    gate_up.requires_grad_()
    h = moe_ops.gated_act(gate_up, activation)
    (grad,) = torch.autograd.grad(h.sum(), gate_up)
    where = torch.zeros(2, 150, dtype=torch.bool)
    where[1, column] = True
    assert_identical(h.isnan(), where)
    assert_identical(grad.isnan(), torch.cat([where, where], dim=1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(2, 5),), ["gate_up", "[2, 5]"]),
        ((torch.zeros(()),), ["gate_up", "[]"]),
        ((torch.zeros(2, 4, dtype=torch.int32),), ["gate_up", "int32"]),
        ((torch.zeros(2, 4, dtype=torch.complex64),), ["gate_up", "complex64"]),
        ((torch.zeros(2, 4), "silu"), ["activation", "silu"]),
        ((torch.zeros(2, 4), "SwiGLU"), ["activation", "SwiGLU"]),
        ((torch.zeros(2, 4), ""), ["activation"]),
    ],
    ids=["odd", "scalar", "int", "complex", "plain", "case", "empty"],
)
def test_bad_input(arguments, words, bad_input):
    with bad_input("gated_act", *words):
        moe_ops.gated_act(*arguments)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_bad_limit(limit, bad_input):
    with bad_input("gated_act", "limit"):
        moe_ops.gated_act(torch.zeros(2, 4), "swiglu_oai", limit=limit)

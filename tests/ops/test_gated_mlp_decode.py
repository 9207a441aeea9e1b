from __future__ import annotations

import pytest
import torch
from tests.helpers.op_case import OpCase
from tests.helpers.quantized import label_of, quantized

import moe_ops
from moe_ops import reference
from moe_ops.quant import dequantize_weight
from moe_ops.testing import as_strided_copy, assert_identical, eps, short

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def small_call(s):
    return {
        "x": s.float(s.t, s.h),
        "w_gate": s.float(s.i, s.h),
        "w_up": s.float(s.i, s.h),
        "w_down": s.float(s.o, s.i),
        "norm_weight": s.float(s.h),
        "output_gate": s.float(s.h),
        "residual": s.float(s.t, s.o),
    }


OP_CASES = {
    "gated_mlp_decode": OpCase(
        small_call,
        bad_arguments={
            "activation": ("", "silu", "swiglu_oai", "SWIGLU"),
            "eps": (-1.0, float("nan")),
            "residual_scale": (float("inf"), float("nan")),
        },
        mixed_floats=(),
        by_token=("x", "residual"),
        kind="quantized",
    )
}


def operands(dtype=torch.float32, tokens=3, hidden=40, width=24, features=40, **options):
    def normal(*shape):
        return (torch.randn(shape) * (max(shape[-1], 1) ** -0.5 if len(shape) == 2 else 1)).to(
            dtype
        )

    return {
        "x": torch.randn(tokens, hidden).to(dtype),
        "w_gate": normal(width, hidden),
        "w_up": normal(width, hidden),
        "w_down": normal(features, width),
        "norm_weight": 1 + normal(hidden) / 4,
        "output_gate": normal(hidden) / 8,
        "residual": torch.randn(tokens, features).to(dtype),
        "residual_scale": 0.7,
        **options,
    }


def wide(call):
    return {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in call.items()
    }


def check(call):
    y, want = moe_ops.gated_mlp_decode(**call), reference.gated_mlp_decode(**wide(call))
    assert y.dtype == call["x"].dtype and y.shape == want.shape
    # A few roundings to dtype on the way, and sums of as many terms as these tests have.
    assert (y.double() - want).norm() <= 30 * eps(y.dtype) * want.norm()
    return y


@dtypes
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "reglu"])
def test_values(dtype, activation):
    check(operands(dtype, activation=activation))


@dtypes
@pytest.mark.parametrize("given", ["norm_weight", "output_gate", "residual", None])
def test_what_is_not_given_is_left_out(dtype, given):
    call = operands(dtype, tokens=1, hidden=33, width=65, features=7, residual_scale=1.0)
    for name in {"norm_weight", "output_gate", "residual"} - {given}:
        call[name] = None
    check(call)


def test_sizes():
    for tokens, hidden, width, features in ((1, 1, 1, 1), (65, 130, 70, 257), (5, 8, 300, 3)):
        check(operands(torch.bfloat16, tokens, hidden, width, features))


@pytest.mark.parametrize("sizes", [(0, 8, 8, 8), (3, 0, 8, 8), (3, 8, 0, 8), (3, 8, 8, 0)])
def test_nothing(sizes):
    call = operands(torch.float32, *sizes, norm_weight=None)
    y = moe_ops.gated_mlp_decode(**call)
    assert y.shape == (sizes[0], sizes[3])
    if sizes[1] == 0 or sizes[2] == 0:
        assert_identical(y, call["residual"])


@pytest.mark.cpu_only
@dtypes
def test_the_same_bits_for_any_layout_and_number_of_threads(dtype, set_threads):
    """Large enough for a region of several threads."""
    call = operands(dtype, tokens=6, hidden=512, width=384, features=512)
    set_threads(1)
    want = moe_ops.gated_mlp_decode(**call)
    for threads in (2, 4):
        set_threads(threads)
        assert_identical(moe_ops.gated_mlp_decode(**call), want)
    for name in ("x", "residual"):
        call[name] = as_strided_copy(call[name], "step2_last")
    assert_identical(moe_ops.gated_mlp_decode(**call), want)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 64)])
def test_codes(bits, group):
    """Codes act as in grouped_gemm_quantized: weights are exact, rows are rounded to integers."""
    call = operands(torch.bfloat16, hidden=128, width=64, features=48)
    kind, exact = label_of(bits, group), dict(call)
    call["formats"] = [kind, "float", kind]
    for name in ("w_gate", "w_down"):  # w_up stays as it is: each is for itself.
        q, scale = quantized(call[name].float()[None], bits, group)
        call |= {name: q[0], f"{name}_scale": scale[0]}
        exact[name] = dequantize_weight(q, scale, kind)[0].double()
    want = reference.gated_mlp_decode(**wide(exact))
    assert (moe_ops.gated_mlp_decode(**call).double() - want).norm() <= 0.03 * want.norm()


def test_no_gradient():
    call = operands()
    call["x"].requires_grad_()
    with pytest.raises(
        NotImplementedError, match="gated_mlp_decode: it has no gradient, and x requires"
    ):
        moe_ops.gated_mlp_decode(**call)
    with torch.no_grad():
        moe_ops.gated_mlp_decode(**call)


@pytest.mark.cpu_only
def test_opcheck_and_compiled():
    call = operands(torch.bfloat16)
    schema = torch.ops.moe_ops.gated_mlp_decode.default._schema
    row = [call.get(a.name, a.default_value) for a in schema.arguments]
    torch.library.opcheck(torch.ops.moe_ops.gated_mlp_decode.default, tuple(row))
    compiled = torch.compile(moe_ops.gated_mlp_decode, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(**call), moe_ops.gated_mlp_decode(**call))


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 40)}, r"x must be \[T, H\]"),
        ({"w_gate": torch.zeros(24, 39)}, r"w_gate must have rows of 40 weights, got 39"),
        ({"w_up": torch.zeros(23, 40)}, r"w_up must have the number of features = 24"),
        ({"w_down": torch.zeros(40, 23)}, r"w_down must have rows of 24 weights, got 23"),
        ({"w_up": torch.zeros(24, 40, dtype=torch.int8)}, r"w_up must be float32 like x, got int8"),
        ({"output_gate": torch.zeros(41)}, r"output_gate must have H = 40"),
        ({"residual": torch.zeros(3, 41)}, r"residual must have O = 40"),
        ({"activation": "swiglu_oai"}, r"activation must be one of swiglu, geglu, geglu_tanh, re"),
        ({"residual_scale": float("inf")}, r"residual_scale must be finite, got inf"),
    ],
)
def test_bad_calls(change, message):
    with pytest.raises(ValueError, match=f"gated_mlp_decode: {message}"):
        moe_ops.gated_mlp_decode(**{**operands(), **change})

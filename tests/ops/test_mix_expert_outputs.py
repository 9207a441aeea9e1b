from __future__ import annotations

import pytest
import torch
from tests.helpers.op_case import OpCase
from torch import nn

import moe_ops
from moe_ops import reference
from moe_ops.ops.mix_expert_outputs import MIX_ACTIVATIONS
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)


def normalized_call(s):
    acc = torch.float64 if s.dtype == torch.float64 else torch.float32
    features = {
        name: torch.rand(s.e, s.o, dtype=acc)
        for name in ("norm_weight", "norm_bias", "mean", "var")
    }
    return {
        "outputs": s.float(s.t, s.e, s.o),
        "weights": s.float(s.t, s.k, s.e),
        "factor": s.float(s.t, s.k, s.o),
        **features,
        "activation": "silu",
    }


OP_CASES = {
    "mix_expert_outputs": OpCase(
        normalized_call,
        free_dims={"factor": {0}},
        bad_arguments={
            "activation": ("", "swish", "ReLU", "relu\0"),
            "eps": (-1.0, float("nan")),
            "norm_weight": (None,),
            "norm_bias": (None,),
            "mean": (None,),
            "var": (None,),
        },
        mixed_floats=(),
    )
}
FLOATS = ("outputs", "weights", "factor", "norm_weight", "norm_bias")
NORMS = ("plain", "given", "batch")


def operands(num_tokens, experts, size, mixtures, dtype, norm="plain", activation="none"):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    call = {
        "outputs": (torch.randn(num_tokens, experts, size) + 0.5).to(dtype),
        "weights": torch.randn(num_tokens, mixtures, experts).to(dtype),
        "activation": activation,
    }
    if norm != "plain":
        call["norm_weight"] = torch.randn(experts, size).to(acc)
        call["norm_bias"] = torch.randn(experts, size).to(acc)
    if norm == "given":
        call["mean"] = torch.randn(experts, size).to(acc)
        call["var"] = torch.rand(experts, size).to(acc) + 0.1
    return call


def mixture(function):
    return lambda **call: function(**call)[0]


def magnitude(
    outputs,
    weights,
    factor=None,
    norm_weight=None,
    norm_bias=None,
    mean=None,
    var=None,
    **rest,
):
    """Bounds values and, as a function of every operand, their derivatives.

    |act| <= 1 + |n| with slopes of at most 1.1. Batch statistics: a normalized feature and the
    derivatives of it move with the features of all tokens, by at most what 3 / deviation times the
    feature and its mean over tokens do.
    """
    n = outputs
    if norm_weight is not None:
        if mean is None:
            spread = outputs.detach().mean(0)
            n = 3 * (n + n.mean(0)) / spread.clamp(min=0.3) + 1
        else:
            n = (n + mean) / (var + rest.get("eps", 1e-5)).sqrt()
        n = n * norm_weight + norm_bias
    act = rest["activation"]
    n = n if act == "none" else 1 + 1.1 * n + (0.3 * n * n if act in ("silu", "sigmoid") else 0)
    y = torch.einsum("tme,teo->tmo", weights, n)
    return (
        y
        if factor is None or not len(factor)
        else y * factor.repeat_interleave(len(y) // len(factor), 0)
    )


def check(call, wrt=None, **kwargs):
    wrt = [name for name in FLOATS if name in call] if wrt is None else wrt
    t, e, o = call["outputs"].shape
    check_against_reference(
        mixture(moe_ops.mix_expert_outputs),
        mixture(reference.mix_expert_outputs),
        call,
        wrt,
        magnitude=magnitude,
        sum_length=max(1, t, e, o, call["weights"].shape[1]),
        **kwargs,
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("experts", "size", "mixtures"),
    [
        (1, 1, 1),
        (2, 3, 1),
        (3, 8, 2),
        (5, 16, 4),
        (8, 32, 3),
        (16, 32, 8),
        (17, 33, 9),
        (31, 5, 13),
    ],
)
def test_sizes(experts, size, mixtures, dtype, norm):
    check(operands(19, experts, size, mixtures, dtype, norm, "silu"))


@pytest.mark.parametrize("repeats", [1, 2, 3, 7, 84])
@pytest.mark.parametrize("size", [5, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_factor(dtype, size, repeats):
    """Runs of tokens that share one, also where a block of tokens would cut them."""
    for norm in ("plain", "batch"):
        call = operands(84 * 5, 2, size, 3, dtype, norm, "sigmoid")
        call["factor"] = torch.randn(84 * 5 // repeats, 3, size).to(dtype)
        check(call)


@pytest.mark.parametrize("activation", MIX_ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_activations(dtype, norm, activation):
    check(operands(13, 6, 20, 3, dtype, norm, activation))


@pytest.mark.parametrize("num_tokens", [0, 1, 9, 63, 64, 65, 600, 1300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("norm", NORMS)
def test_tokens(norm, dtype, num_tokens):
    """Blocks of tokens, and the parts that sum by themselves."""
    check(operands(num_tokens, 3, 9, 2, dtype, norm, "silu"))


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_gradients_of_weights_in_every_number_of_experts(dtype, experts):
    check(operands(5, experts, 32, 2, dtype, activation="sigmoid"), ["weights"])


@pytest.mark.parametrize("shape", [(4, 3, 0, 2), (4, 3, 5, 0), (0, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_empty_sizes(dtype, norm, shape):
    check(operands(*shape, dtype, norm, "relu"))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("name", [*FLOATS, "mean", "var"])
def test_views(name, view):
    call = operands(12, 3, 7, 2, torch.float32, "given", "silu")
    call["factor"] = torch.randn(4, 2, 7)
    call[name] = as_strided_copy(call[name], view)
    check(call, grad_view=view)


@pytest.mark.parametrize("norm", NORMS)
def test_one_gradient_at_a_time(norm):
    call = operands(150, 3, 8, 2, torch.float32, norm, "silu")
    call["factor"] = torch.randn(50, 2, 8)
    for wanted in FLOATS:
        if wanted in call:
            check(call, [wanted])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["none", "silu", "sigmoid"])
def test_gradcheck(activation, norm):
    call = operands(6, 3, 4, 2, torch.float64, norm, activation)
    call["factor"] = torch.randn(3, 2, 4, dtype=torch.float64)
    names = [name for name in FLOATS if name in call]
    rest = {name: value for name, value in call.items() if name not in names}
    leaves = [call[name].requires_grad_() for name in names]

    def function(*tensors):
        return moe_ops.mix_expert_outputs(**dict(zip(names, tensors, strict=True)), **rest)[0]

    assert torch.autograd.gradcheck(function, leaves)


def test_statistics_are_those_of_batch_norm():
    call = operands(700, 3, 5, 2, torch.float32, "batch")
    call["outputs"] += 1000  # a mean that is large beside the deviation
    _, mean, var = moe_ops.mix_expert_outputs(**call)
    exact = call["outputs"].double()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var(0, correction=0), rtol=1e-4, atol=0)
    norm = nn.BatchNorm1d(15, momentum=1.0)
    norm(call["outputs"].flatten(1))
    torch.testing.assert_close(mean.flatten(), norm.running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(var.flatten() * 700 / 699, norm.running_var, rtol=1e-4, atol=0)
    for name in ("plain", "given"):
        _, *empty = moe_ops.mix_expert_outputs(**operands(4, 3, 5, 2, torch.float32, name))
        assert [t.shape for t in empty] == [(0,), (0,)]


def test_double_backward_says_so():
    call = operands(4, 2, 3, 1, torch.float64)
    call["outputs"].requires_grad_()
    y, *_ = moe_ops.mix_expert_outputs(**call)
    (grad,) = torch.autograd.grad(y.sum(), call["outputs"], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="mix_expert_outputs"):
        torch.autograd.grad(grad.sum(), call["outputs"])


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm, requires_grad):
    call = operands(5, 3, 4, 2, torch.float32, norm, "silu")
    for name in FLOATS:
        if name in call:
            call[name].requires_grad_(requires_grad)
    names = (*FLOATS, "mean", "var", "activation")
    args = tuple(call.get(name) for name in names)
    torch.library.opcheck(torch.ops.moe_ops.mix_expert_outputs.default, args)


def test_compile():
    call = operands(7, 3, 5, 2, torch.float32, "batch", "silu")
    call["factor"] = torch.randn(7, 2, 5)
    leaves = [call[name].requires_grad_() for name in FLOATS]
    compiled = torch.compile(moe_ops.mix_expert_outputs, fullgraph=True, backend="aot_eager")
    got, want = compiled(**call)[0], moe_ops.mix_expert_outputs(**call)[0]
    assert_identical(got, want)
    grad = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want)), strict=True):
        assert_identical(a, b)


def test_autocast_computes_in_its_type():
    call = operands(5, 3, 4, 2, torch.float32, "batch", "silu")
    half = {**call, **{name: call[name].bfloat16() for name in ("outputs", "weights")}}
    want = moe_ops.mix_expert_outputs(**half)[0]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = moe_ops.mix_expert_outputs(**call)[0]
    assert_identical(got, want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_same_bits_for_any_thread_count(dtype, norm, set_threads):
    call = operands(3000, 5, 17, 4, dtype, norm, "silu")
    call["factor"] = torch.randn(1000, 4, 17).to(dtype)
    leaves = [call[name].requires_grad_() for name in FLOATS if name in call]
    grad = torch.randn(3000, 4, 17).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        y, mean, var = moe_ops.mix_expert_outputs(**call)
        runs.append((y, mean, var, *torch.autograd.grad(y, leaves, grad)))
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert_identical(got, want)


def test_nan_stays_with_its_token():
    call = operands(100, 3, 6, 2, torch.float32, "given", "silu")
    call["outputs"][70, 1, 4] = torch.nan
    nan = moe_ops.mix_expert_outputs(**call)[0].isnan()
    assert nan[70, :, 4].all() and int(nan.sum()) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outputs": torch.zeros(4, 3)}, ["outputs must be [T, E, O]", "[4, 3]"]),
        ({"outputs": torch.zeros(4, 3, 5).int()}, ["outputs must be", "int32"]),
        ({"outputs": torch.zeros(4, 0, 5)}, ["at least 1"]),
        ({"weights": torch.zeros(4, 2, 4)}, ["weights must have E = 3", "[4, 2, 4]"]),
        ({"weights": torch.zeros(5, 2, 3)}, ["weights must have T = 4", "[5, 2, 3]"]),
        ({"weights": torch.zeros(4, 2, 3).double()}, ["weights must be float32", "float64"]),
        ({"factor": torch.zeros(3, 2, 5)}, ["factor must have", "divides T = 4", "[3, 2, 5]"]),
        ({"factor": torch.zeros(4, 1, 5)}, ["factor must have M = 2", "[4, 1, 5]"]),
        ({"norm_weight": torch.zeros(3, 4)}, ["norm_weight must have O = 5", "[3, 4]"]),
        ({"norm_bias": torch.zeros(3, 5).double()}, ["norm_bias must be float32", "float64"]),
        ({"norm_bias": None}, ["norm_bias must come with norm_weight", "None"]),
        ({"var": None}, ["var must come with mean", "None"]),
        ({"norm_weight": None, "norm_bias": None}, ["norm_weight must come with mean", "None"]),
        ({"activation": "gelu"}, ["activation must be one of none", "'gelu'"]),
        ({"eps": -1.0}, ["eps must be at least 0", "-1"]),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_calls(change, words):
    call = {**operands(4, 3, 5, 2, torch.float32, "given"), **change}
    for device in ("cpu", "meta"):
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        with pytest.raises((ValueError, RuntimeError)) as error:
            moe_ops.mix_expert_outputs(**moved)
        for word in ("mix_expert_outputs", *words):
            assert word in str(error.value)

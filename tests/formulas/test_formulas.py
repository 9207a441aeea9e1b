"""The formulas of single layers beside the reference, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.helpers.nearness import WithoutHost, check
from tests.ops import test_gated_mlp_decode as gated_mlp_decode_calls

import moe_ops
from moe_ops import reference
from moe_ops.formulas.add_rms_norm import add_rms_norm
from moe_ops.formulas.gated_mlp_decode import gated_mlp_decode
from moe_ops.formulas.rotary import rotary
from moe_ops.formulas.router_linear import router_linear
from moe_ops.ops._library import Signature, cuda_formulas
from moe_ops.testing import VIEWS, as_strided_copy, assert_identical, short

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
ALL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", ALL, ids=short)
modes = pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])


def kernel(op):
    """Returns the CUDA kernel of an op with the op's arguments, as it runs below autograd."""
    signature = Signature(op)

    def run(**call):
        row = [call.get(n, d) for n, d in zip(signature.names, signature.defaults, strict=True)]
        with WithoutHost():
            return cuda_formulas[op](*row)

    return run


def with_backward(op, saved, wrt, outputs=1):
    """Returns the op made of its CUDA kernels, forward and backward, as a function with gradients.

    saved: from the outputs of the forward kernel and its call to the arguments of the backward one.
    wrt: the operands that the backward kernel gives gradients of, in its order.
    """

    class Kernels(torch.autograd.Function):
        @staticmethod
        def forward(ctx, call, *leaves):
            ctx.call = {**call, **dict(zip(call["leaves"], leaves, strict=True))}
            del ctx.call["leaves"]
            ctx.forward_op = f"{op}_fwd" if f"{op}_fwd" in cuda_formulas else op
            found = kernel(ctx.forward_op)(**ctx.call)
            ctx.found = tuple(t.detach() for t in found)
            ctx.set_materialize_grads(False)
            return tuple(found[:outputs])

        @staticmethod
        def backward(ctx, *grads):
            arguments = saved(ctx.call, ctx.found, grads)
            found = kernel(f"{op}_bwd")(**arguments)
            by_name = dict(zip(wrt, found, strict=True))
            return None, *(by_name[n] for n in ctx.call["names"])

    def run(**call):
        names = [n for n in wrt if isinstance(call.get(n), torch.Tensor)]
        leaves = [call[n] for n in names]
        rest = {n: v for n, v in call.items() if n not in names}
        found = Kernels.apply({**rest, "leaves": names, "names": names}, *leaves)
        return found if outputs > 1 else found[0]

    return run


# --- rotary


@both_dtypes
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 8), (1, 1, 6), (0, 3, 2, 4), (2, 0, 1, 2), (2, 3, 1, 0)]
)
@pytest.mark.parametrize(("inverse", "by_sequence"), [(False, False), (True, True)])
def test_rotary(shape, inverse, by_sequence, dtype):
    angles = torch.randn(
        *shape[: 2 if by_sequence else 0], *shape[1:2] * (not by_sequence), shape[-1] // 2
    )
    for view in VIEWS:
        call = {
            "t": as_strided_copy(torch.randn(shape).to(dtype), view),
            "cos": as_strided_copy(angles.cos().to(dtype), view),
            "sin": as_strided_copy(angles.sin().to(dtype), view),
            "inverse": inverse,
        }
        check(rotary, reference.rotary, call, ["t"], sum_length=2)


def test_rotary_has_constant_angles_and_a_second_derivative():
    t, cos, sin = (
        torch.randn(*s).double().requires_grad_() for s in ((1, 2, 2, 4), (2, 2), (2, 2))
    )
    assert (
        torch.autograd.grad(rotary(t, cos, sin).sum(), (cos, sin), allow_unused=True) == (None,) * 2
    )
    angles = cos.detach(), sin.detach()
    assert torch.autograd.gradgradcheck(lambda t: rotary(t, *angles).square(), t)


def test_rotary_keeps_a_nan_in_its_pair():
    t, angles = torch.ones(1, 2, 1, 8), torch.ones(2, 4)
    t[0, 1, 0, 1] = torch.nan
    got = rotary(t, angles.cos(), angles.sin())
    assert_identical(got.isnan(), reference.rotary(t, angles.cos(), angles.sin()).isnan())


# --- add_rms_norm

NORM_SHAPES = [(5, 7), (2, 3, 9), (0, 4), (3, 0), (6,), (1, 130)]


def norm_call(shape, residual, bias, dtype):
    view = VIEWS[len(shape)]
    call = {"x": torch.randn(shape), "weight": torch.randn(shape[-1:]), "eps": 1e-5}
    if residual:
        call["residual"] = torch.randn(shape)
    if bias:
        call["bias"] = torch.randn(shape[-1:])
    return {
        n: as_strided_copy(v.to(dtype), view) if isinstance(v, torch.Tensor) else v
        for n, v in call.items()
    }


def norm_kernels():
    def saved(call, found, grads):
        adds = "residual" in call or "bias" in call
        total = found[1] if adds else call["x"]
        grad_y = torch.zeros_like(total) if grads[0] is None else grads[0]
        needs = dict.fromkeys(("need_x", "need_weight", "need_bias"), True)
        return {
            "grad_y": grad_y,
            "grad_sum": grads[1] if adds else None,
            "sum": total,
            "weight": call["weight"],
            "rstd": found[2],
            **needs,
        }

    return with_backward("add_rms_norm", saved, ("x", "weight", "bias"), outputs=2)


@both_dtypes
@pytest.mark.parametrize("shape", NORM_SHAPES)
@pytest.mark.parametrize(("residual", "bias"), itertools.product((False, True), repeat=2))
def test_add_rms_norm(shape, residual, bias, dtype):
    call = norm_call(shape, residual, bias, dtype)
    wrt = [n for n, v in call.items() if isinstance(v, torch.Tensor)]
    check(add_rms_norm, reference.add_rms_norm, call, wrt, sum_length=shape[-1])
    if not (residual or bias):
        assert add_rms_norm(**call)[1] is call["x"]


@both_dtypes
@modes
@pytest.mark.parametrize("shape", NORM_SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_add_rms_norm_below_autograd(shape, residual, invariant, dtype):
    call = norm_call(shape, residual, residual, dtype)
    wrt = [n for n, v in call.items() if isinstance(v, torch.Tensor) and n != "residual"]
    if not residual:  # The second output is then [0]: the op returns x.
        call["bias"] = torch.zeros(shape[-1:], dtype=dtype)
        wrt.append("bias")
    with moe_ops.batch_invariant(invariant):
        check(norm_kernels(), reference.add_rms_norm, call, wrt, sum_length=shape[-1])


@pytest.mark.parametrize("dtype", ALL[2:], ids=short)
def test_add_rms_norm_rounds_the_sum_once(dtype):
    call = norm_call((33, 65), True, True, dtype)
    (y, total), (want_y, want) = add_rms_norm(**call), reference.add_rms_norm(**call)
    assert_identical(total, want)
    unit = torch.finfo(dtype).eps
    assert (y.double() - want_y.double()).norm() <= unit * want_y.double().norm()


def test_add_rms_norm_keeps_a_nan_in_its_row():
    x = torch.randn(3, 5)
    x[1, 2] = torch.nan
    y, _ = add_rms_norm(x, torch.ones(5))
    assert y.isnan().any(-1).tolist() == [False, True, False]


# --- router_linear


@both_dtypes
@modes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts"), [(5, 9, 4), (0, 3, 2), (3, 0, 2), (1, 1, 1)]
)
def test_router_linear(tokens, hidden, experts, bias, invariant, dtype):
    call = {
        "x": as_strided_copy(torch.randn(tokens, hidden).to(dtype), "step2_last"),
        "weight": as_strided_copy(torch.randn(experts, hidden).to(dtype), "transposed"),
    }
    if bias:
        call["bias"] = torch.randn(experts).to(dtype)
    wrt = list(call)

    def saved(call, found, grads):
        needs = dict.fromkeys(("need_x", "need_weight", "need_bias"), True)
        return {"grad_logits": grads[0], "x": call["x"], "weight": call["weight"], **needs}

    with moe_ops.batch_invariant(invariant):
        by_rule = with_backward_of_one("router_linear", saved, ("x", "weight", "bias"))
        for function in (by_rule,) if invariant else (by_rule, router_linear):
            check(function, reference.router_linear, call, wrt, sum_length=max(hidden, tokens))


def with_backward_of_one(op, saved, wrt):
    """Like `with_backward`, for an op whose kernel returns one tensor."""
    one = cuda_formulas[op]
    with_tuple = with_backward(op, saved, wrt)

    def run(**call):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(cuda_formulas, op, lambda *row: (one(*row),))
            return with_tuple(**call)

    return run


def test_router_linear_in_float32():
    x, weight = torch.randn(4, 33).bfloat16(), torch.randn(6, 33).bfloat16()
    got = router_linear(x, weight, logits_dtype=torch.float32)
    assert got.dtype == torch.float32
    call = {"x": x.float(), "weight": weight.float()}
    check(lambda **_: got, reference.router_linear, call, sum_length=33)


# --- all_experts_ffn


@both_dtypes
@modes
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize(("tokens", "inputs", "bias"), [(5, 3, True), (0, 2, True), (4, 1, False)])
def test_all_experts_ffn(tokens, inputs, bias, activation, invariant, dtype):
    experts, hidden, width, features = 4, 7, 6, 5
    call = {
        "x": as_strided_copy(torch.randn(tokens, inputs, hidden).to(dtype), "step2"),
        "w_up": torch.randn(experts, width, hidden).to(dtype),
        "w_down": as_strided_copy(torch.randn(experts, features, width).to(dtype), "transposed"),
        "input_ids": torch.randint(0, inputs, (experts,)),
        "activation": activation,
    }
    if bias:
        call |= {
            "b_up": torch.randn(experts, width).to(dtype),
            "b_down": torch.randn(experts, features).to(dtype),
        }

    def saved(call, found, grads):
        names = ("x", "w_up", "w_down", "input_ids", "activation")
        needs = {f"need_{n}": True for n in ("x", "w_up", "w_down", "b_up", "b_down")}
        return {"grad_y": grads[0], "preact": found[1], **{n: call[n] for n in names}, **needs}

    wrt = [n for n, v in call.items() if isinstance(v, torch.Tensor) and n != "input_ids"]
    ours = with_backward("all_experts_ffn", saved, ("x", "w_up", "w_down", "b_up", "b_down"))
    with moe_ops.batch_invariant(invariant):
        check(ours, reference.all_experts_ffn, call, wrt, sum_length=hidden + width + tokens)


# --- mix_expert_outputs


@both_dtypes
@modes
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "sigmoid"])
@pytest.mark.parametrize("norm", [None, "tokens", "given"])
@pytest.mark.parametrize(("tokens", "shared"), [(6, 2), (0, 0), (4, None)])
def test_mix_expert_outputs(tokens, shared, norm, activation, invariant, dtype):
    experts, mixtures, features = 3, 2, 5
    call = {
        "outputs": as_strided_copy(torch.randn(tokens, experts, features).to(dtype), "transposed"),
        "weights": as_strided_copy(torch.randn(tokens, mixtures, experts).to(dtype), "step2_last"),
        "activation": activation,
        "eps": 1e-3,
    }
    if shared is not None:
        call["factor"] = torch.randn(tokens // max(shared, 1), mixtures, features).to(dtype)
    if norm is not None:
        call |= {n: torch.randn(experts, features).to(dtype) for n in ("norm_weight", "norm_bias")}
    wrt = [n for n, v in call.items() if isinstance(v, torch.Tensor)]
    if norm == "given":
        call |= {"mean": torch.randn(experts, features).to(dtype)}
        call |= {"var": 0.5 + torch.rand(experts, features).to(dtype)}

    def saved(call, found, grads):
        batch = norm == "tokens"
        names = ("outputs", "weights", "factor", "norm_weight", "norm_bias", "activation", "eps")
        mean, var = found[1:] if batch else (call.get("mean"), call.get("var"))
        needs = {f"need_{n}": True for n in ("weights", "factor", "norm_weight", "norm_bias")}
        given = {n: call.get(n) for n in names}
        return {"grad_y": grads[0], **given, "mean": mean, "var": var, "batch": batch, **needs}

    of = ("outputs", "weights", "factor", "norm_weight", "norm_bias")
    ours = with_backward("mix_expert_outputs", saved, of)
    with moe_ops.batch_invariant(invariant):
        check(
            ours, lambda **c: reference.mix_expert_outputs(**c)[0], call, wrt, sum_length=9 + tokens
        )
        got = kernel("mix_expert_outputs")(**call)[1:]
    for statistic, want in zip(got, reference.mix_expert_outputs(**call)[1:], strict=True):
        torch.testing.assert_close(statistic, want)


# --- gated_mlp_decode


@all_dtypes
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "geglu_tanh", "reglu"])
@pytest.mark.parametrize(
    ("tokens", "given"),
    [
        (3, ("norm_weight", "output_gate", "residual")),
        (1, ("norm_weight",)),
        (2, ("output_gate",)),
        (4, ("residual",)),
        (0, ("norm_weight", "output_gate", "residual")),
    ],
)
def test_gated_mlp_decode(tokens, given, activation, dtype):
    call = gated_mlp_decode_calls.operands(dtype, tokens=tokens, activation=activation)
    for name in {"norm_weight", "output_gate", "residual"} - set(given):
        call[name] = None
    for name in ("x", "w_gate", "w_down"):
        call[name] = as_strided_copy(call[name], "step2_last")
    check(gated_mlp_decode, reference.gated_mlp_decode, call, sum_length=64)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32)])
def test_gated_mlp_decode_of_codes(bits, group):
    call = gated_mlp_decode_calls.operands(torch.float32, hidden=64, width=32, features=8)
    for name in ("w_gate", "w_up", "w_down"):
        call |= {name: torch.randint(-127, 127, call[name].shape, dtype=torch.int8)}
        call[f"{name}_scale"] = torch.rand(len(call[name])) / 200
        if bits == 4:
            call[name] = call[name][:, ::2].contiguous().view(torch.uint8)
            call[f"{name}_scale"] = torch.rand(len(call[name]), call[name].shape[1] * 2 // group)
    call["residual"] = call["residual"][:, :8]
    call["formats"] = "int8" if bits == 8 else f"int4 g{group}"
    check(gated_mlp_decode, reference.gated_mlp_decode, call, sum_length=96)


def test_gated_mlp_decode_keeps_a_nan_in_its_token():
    call = gated_mlp_decode_calls.operands(torch.float32)
    call["x"][1, 2] = torch.nan
    got = check(gated_mlp_decode, reference.gated_mlp_decode, call, sum_length=64)["output 0"]
    assert got.isnan().any(-1).tolist() == [False, True, False]

"""Experts that train in fp8: `fp8_ffn` against the same steps in plain torch, its gradients against
those of exact products, and the codes of weights that it keeps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.helpers.ffn import ffn_operands
from tests.helpers.fp8 import fp8_ffn_steps
from tests.helpers.moe import build_moe
from tests.helpers.routing import Routing

import moe_ops
from moe_ops import reference
from moe_ops.layers import Experts, clear_fp8_cache
from moe_ops.layers.fp8 import fp8_ffn, fp8_weight
from moe_ops.quant import quantize_fp8_blocks
from moe_ops.testing import assert_identical, eps, short, widened

NAMES = ("x", "w_gate_up", "w_down", "topk_weights", "b_gate_up", "b_down")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)
SMALL = Routing(40, 5, 2)
# What rounding normal numbers to e4m3 by blocks of 128 adds to their norm (test_quantize_fp8).
ROUNDING = 0.0265


def differentiated(function, call, grad_y=None):
    """The output and the gradients by name."""
    leaves = {n: call[n].detach().clone().requires_grad_() for n in NAMES if n in call}
    y = function(**{**call, **leaves})
    if grad_y is None:
        torch.manual_seed(3)
        grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype))
    return y.detach(), dict(zip(leaves, grads, strict=True))


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def check_steps(call, dtype, master):
    """Against the documented steps with exact sums. A number that lies on a boundary of two codes
    may take the other one, which is rare; everything else is rounding of fp32 and of x's dtype."""
    for name in ("w_gate_up", "w_down"):
        call[name] = call[name].to(master)
    y, grads = differentiated(fp8_ffn, call)
    torch.manual_seed(3)
    grad_y = torch.randn_like(y)
    want_y, want = fp8_ffn_steps(call, grad_y)
    bound = 3e-3 + 2 * eps(dtype)
    assert y.dtype == dtype
    assert relative(y, want_y) <= bound
    for name, grad in grads.items():
        assert grad.dtype == call[name].dtype and grad.shape == call[name].shape, name
        assert relative(grad, want[name]) <= bound, (name, relative(grad, want[name]))


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=short)
@dtypes
def test_steps(dtype, master):
    check_steps(ffn_operands(SMALL, 160, 136, dtype, activation="swiglu"), dtype, master)


@pytest.mark.parametrize("on_input", [False, True], ids=["on_output", "on_input"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    "activation",
    ["swiglu", "geglu_tanh", "swiglu_oai", "silu", "gelu", "gelu_tanh", "relu", "relu2"],
)
def test_options(activation, bias, on_input):
    call = ffn_operands(SMALL, 72, 48, torch.float32, activation=activation, bias=bias)
    call["apply_router_weight_on_input"] = on_input
    check_steps(call, torch.float32, torch.float32)


@pytest.mark.parametrize(
    "kind", ["dropped", "out_of_range", "half_empty", "one_expert", "repeated"]
)
def test_routings(kind):
    call = ffn_operands(
        Routing(70, 6, 3, kind), 72, 48, torch.float32, activation="swiglu", bias=True
    )
    check_steps(call, torch.float32, torch.float32)
    _, grads = differentiated(fp8_ffn, call)
    used = torch.zeros(6, dtype=torch.bool)
    ids = call["topk_ids"].flatten()
    used[ids[(ids >= 0) & (ids < 6)].long()] = True
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        assert bool((grads[name][~used] == 0).all()), name


def test_many_rows_of_an_expert():
    """Several groups of 128 rows, the last one not full."""
    call = ffn_operands(Routing(300, 2, 1), 136, 264, torch.float32, activation="swiglu")
    check_steps(call, torch.float32, torch.float32)


# How many numbers are rounded to e4m3 on the way to each result, those that reach it twice (gate
# and up) counted twice: x, w_gate_up, h and w_down forward; grad_y and w_down again, then
# grad_preact and w_gate_up, or x, backward.
ROUNDINGS = {"y": 6, "x": 8, "w_gate_up": 8, "w_down": 6, "topk_weights": 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_error_of_the_gradients(dtype):
    """Against exact products: roundings are independent, so their squares add up; half as much
    again for the curvature of the activation."""
    call = ffn_operands(Routing(256, 4, 2), 256, 384, torch.float32, activation="swiglu")
    exact = widened(call)
    grad_y = torch.randn(256, 256)
    y, want = differentiated(reference.moe_ffn, exact, grad_y)
    call["x"] = call["x"].to(dtype)
    got_y, got = differentiated(fp8_ffn, call, grad_y)
    for name, grad in {"y": got_y, **got}.items():
        bound = 1.5 * ROUNDING * math.sqrt(ROUNDINGS[name]) + 4 * eps(dtype)
        error = relative(grad, y if name == "y" else want[name])
        assert 0.2 * bound < error <= bound, (name, error, bound)


def test_inference_is_moe_ffn_fp8():
    call = ffn_operands(SMALL, 160, 136, torch.bfloat16, activation="swiglu", bias=True)
    weights = (*quantize_fp8_blocks(call["w_gate_up"]), *quantize_fp8_blocks(call["w_down"]))
    routing = (call["topk_weights"], call["topk_ids"])
    biases = {n: call[n] for n in ("b_gate_up", "b_down")}
    want = moe_ops.moe_ffn_fp8(call["x"], *weights, *routing, **biases)
    assert_identical(fp8_ffn(**call), want)
    y, _ = differentiated(fp8_ffn, call)
    # Training rounds pre-activation and activation to bfloat16: a number moves by up to 2^-9, and
    # one in 16 therefore to another of the codes, which are 2^-4 apart: 2^-4 / sqrt(16) together.
    assert relative(y, want) <= 2e-2


@pytest.mark.parametrize("shape", [(0, 2), (5, 0)], ids=str)
def test_no_slots(shape):
    call = ffn_operands(SMALL, 32, 16, torch.float32, activation="swiglu")
    call["x"] = call["x"][: shape[0]]
    call["topk_weights"], call["topk_ids"] = torch.zeros(shape), torch.zeros(shape).int()
    y, grads = differentiated(fp8_ffn, call)
    assert y.shape == (shape[0], 32) and bool((y == 0).all())
    assert all(bool((g == 0).all()) for g in grads.values())


def test_nan_stays_with_its_token_and_its_experts():
    call = ffn_operands(Routing(60, 4, 1), 72, 48, torch.float32, activation="swiglu")
    call["topk_ids"] = torch.arange(60).remainder(4)[:, None].int()
    clean_y, clean = differentiated(fp8_ffn, call, torch.ones(60, 72))
    call["x"] = call["x"].clone()
    call["x"][5, 3] = torch.nan  # a token of expert 1
    y, grads = differentiated(fp8_ffn, call, torch.ones(60, 72))
    others = torch.arange(60) != 5
    assert bool(y[5].isnan().all())
    assert_identical(y[others], clean_y[others])
    assert_identical(grads["x"][others], clean["x"][others])
    experts = torch.tensor([True, False, True, True])
    for name in ("w_gate_up", "w_down"):
        assert_identical(grads[name][experts], clean[name][experts], name)
        assert bool(grads[name][1].isnan().any())


@pytest.mark.parametrize("main", [torch.float32, torch.bfloat16], ids=short)
def test_main_grads(main):
    call = ffn_operands(SMALL, 72, 48, torch.bfloat16, activation="swiglu")
    for name in ("w_gate_up", "w_down"):
        call[name] = call[name].to(main)
    _, want = differentiated(fp8_ffn, call)
    buffers = [torch.ones(call[n].shape, dtype=main) for n in ("w_gate_up", "w_down")]
    leaves = {n: call[n].detach().requires_grad_() for n in ("x", "w_gate_up", "w_down")}
    y = fp8_ffn(**{**call, **leaves}, main_grads=tuple(buffers))
    torch.manual_seed(3)
    y.backward(torch.randn_like(y))
    assert leaves["w_gate_up"].grad is None and leaves["w_down"].grad is None
    for name, buffer in zip(("w_gate_up", "w_down"), buffers, strict=True):
        step = 2 * eps(main)  # of the sum, and of the gradient alone
        torch.testing.assert_close(buffer.double(), want[name].double() + 1, rtol=step, atol=step)
    assert_identical(leaves["x"].grad, want["x"])


def test_only_what_is_wanted():
    call = ffn_operands(SMALL, 72, 48, torch.float32, activation="swiglu", bias=True)
    _, want = differentiated(fp8_ffn, call)
    for name in (n for n in NAMES if n in call):
        leaf = call[name].detach().requires_grad_()
        y = fp8_ffn(**{**call, name: leaf})
        torch.manual_seed(3)
        (grad,) = torch.autograd.grad(y, leaf, torch.randn_like(y))
        assert_identical(grad, want[name], name)


def test_autocast():
    call = ffn_operands(SMALL, 72, 48, torch.float32, activation="swiglu", bias=True)
    half = {**call, **{n: call[n].bfloat16() for n in ("x", "b_gate_up", "b_down")}}
    want_y, want = differentiated(fp8_ffn, half)
    with torch.autocast(call["x"].device.type, torch.bfloat16):
        y, grads = differentiated(fp8_ffn, call, None)
    assert y.dtype == torch.bfloat16
    assert_identical(y, want_y)
    assert grads["w_down"].dtype == torch.float32
    assert_identical(grads["w_down"], want["w_down"])


def test_second_derivatives_and_transforms_raise():
    call = ffn_operands(SMALL, 24, 16, torch.float32, activation="swiglu")
    x = call.pop("x").requires_grad_()
    (grad,) = torch.autograd.grad(fp8_ffn(x, **call).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"fp8_ffn: torch\.func"):
        torch.func.grad(lambda t: fp8_ffn(t, **call).sum())(x.detach())


def test_compile():
    call = ffn_operands(SMALL, 72, 48, torch.bfloat16, activation="swiglu")
    want_y, want = differentiated(fp8_ffn, call)
    compiled = torch.compile(fp8_ffn, fullgraph=True, backend="aot_eager")
    y, grads = differentiated(compiled, call)
    assert_identical(y, want_y)
    for name, grad in grads.items():
        assert_identical(grad, want[name], name)


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(4, 24).double()}, "x", "float64"),
        ({"x": torch.zeros(4)}, "x", "[4]"),
        ({"w_gate_up": torch.zeros(5, 32, 23)}, "w_gate_up", "[5, 32, 23]"),
        ({"w_gate_up": torch.zeros(5, 32, 24).double()}, "w_gate_up", "float64"),
        ({"w_gate_up": torch.zeros(5, 31, 24)}, "w_gate_up", "[5, 31, 24]"),
        ({"w_down": torch.zeros(5, 24, 15)}, "w_down", "[5, 24, 15]"),
        ({"topk_weights": torch.zeros(3, 2)}, "topk_weights", "[3, 2]"),
        ({"topk_ids": torch.zeros(4, 2)}, "topk_ids", "float32"),
        ({"b_down": torch.zeros(5, 24).half()}, "b_down", "float16"),
        ({"activation": "tanh"}, "activation", "tanh"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, name, got, bad_input):
    call = ffn_operands(Routing(4, 5, 2), 24, 16, torch.float32, activation="swiglu")
    with bad_input("fp8_ffn", name, got):
        fp8_ffn(**{**call, **change})


# --- the codes that are kept


def test_codes_are_those_of_the_weight():
    w = torch.randn(3, 200, 140)
    codes = fp8_weight(w)
    q, scale = quantize_fp8_blocks(w)
    assert_identical(codes.q.float(), q.float())
    assert_identical(codes.scale, scale)
    assert_identical(codes.q_t.float(), q.float().mT)
    assert_identical(codes.scale_t, scale.mT)


def test_many_experts_are_rounded_in_parts(monkeypatch):
    w = torch.randn(5, 40, 30)
    want = fp8_weight(w)
    clear_fp8_cache()
    monkeypatch.setattr("moe_ops.formulas.codes._ROUNDED_AT_ONCE", 2500)
    for got, wanted in zip(fp8_weight(w), want, strict=True):
        assert_identical(got.float(), wanted.float())


def test_codes_go_with_every_change_of_the_weight():
    w = torch.nn.Parameter(torch.randn(2, 24, 16))
    codes = fp8_weight(w)
    assert fp8_weight(w) is codes

    def changed(what):
        nonlocal codes
        new = fp8_weight(w)
        assert new is not codes, what
        assert_identical(new.q.float(), quantize_fp8_blocks(w)[0].float(), what)
        codes = new

    with torch.no_grad():
        w.mul_(torch.rand(2, 24, 16))
    changed("in place")
    w.grad = torch.randn_like(w)
    for fused in (False, True)[: 2 if w.device.type == "cpu" else 1]:
        torch.optim.AdamW([w], lr=0.1, fused=fused).step()
        changed("optimizer step")
    w.data = torch.randn(2, 24, 16)
    changed("other storage")
    w.data.mul_(torch.rand(2, 24, 16))  # counts no version
    clear_fp8_cache()
    changed("forgotten")


def test_weights_that_are_not_finite():
    """Weights act as x does: they put NaN in what they reach, without a host that waits
    for the device."""
    call = ffn_operands(Routing(60, 4, 1), 72, 48, torch.float32, activation="swiglu")
    call["topk_ids"] = torch.arange(60).remainder(4)[:, None].int()
    clean = fp8_ffn(**call)
    call["w_down"][1, 3, 5] = torch.inf
    y = fp8_ffn(**call)
    others = torch.arange(60) % 4 != 1
    assert bool(y[~others].isnan().all())
    assert_identical(y[others], clean[others])


# --- the layer


def test_experts():
    torch.manual_seed(0)
    plain = Experts(4, 40, 24, bias=True)
    experts = Experts(4, 40, 24, bias=True, fp8_training=True)
    experts.load_state_dict(plain.state_dict())
    x, weights = torch.randn(30, 40), torch.rand(30, 2)
    ids = torch.randint(0, 4, (30, 2))
    y = experts(x, weights, ids)
    want = fp8_ffn(
        x,
        experts.w_gate_up,
        experts.w_down,
        weights,
        ids,
        b_gate_up=experts.b_gate_up,
        b_down=experts.b_down,
    )
    assert_identical(y, want)
    y.sum().backward()
    assert all(p.grad is not None for p in experts.parameters())
    with torch.no_grad():
        assert relative(experts.eval()(x, weights, ids), plain(x, weights, ids)) < 0.12
    half = experts(x.bfloat16(), weights, ids)
    assert half.dtype == torch.bfloat16
    experts.fp8_training = False
    assert_identical(experts(x, weights, ids), plain(x, weights, ids))


def test_precision_goes_along():
    experts = Experts(4, 40, 24, fp8_training=True)
    assert "fp8_training=True" in repr(experts)
    assert experts.select([1, 2]).fp8_training
    assert copy.deepcopy(experts).fp8_training
    with pytest.raises(ValueError, match="pack_weights"):
        experts.pack_weights()
    quantized = moe_ops.quantize(experts, moe_ops.Int8WeightConfig())
    assert quantized.dequantize().fp8_training is False
    assert build_moe(40, 24, 4, 2, fp8_training=True).experts.fp8_training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fp8_training": True, "output_size": 8}, "output_size must be 40"),
    ],
)
def test_bad_precision(arguments, words):
    with pytest.raises(ValueError, match=words):
        Experts(4, 40, 24, **arguments)


def test_a_layer_learns():
    """A regression to another layer's output: the loss falls as with products of the parameters'
    dtype."""
    torch.manual_seed(0)
    teacher = build_moe(32, 48, 4, 2)
    x = torch.randn(256, 32)
    with torch.no_grad():
        target = teacher(x)
    losses = {}
    for fp8 in (False, True):
        torch.manual_seed(1)
        student = build_moe(32, 48, 4, 2, fp8_training=fp8)
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (student(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses[fp8] = loss.item()
    start = float(target.square().mean())
    assert losses[False] < 0.5 * start
    assert losses[True] < 1.1 * losses[False]

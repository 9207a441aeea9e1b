"""Scores and activations of the formulas beside the reference."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import nearness

from moe_ops.formulas import activations, scores
from moe_ops.reference import _scores
from moe_ops.reference.gated_act import NON_GATED, gated_act, plain_act
from moe_ops.testing import as_strided_copy, assert_close_by_norm, short

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
EDGES = [-torch.inf, -1e4, -90.0, -41.0, -40.0, -39.0, -1.0, 0.0, 1.0, 39.0, 41.0, 1e4]


def test_the_same_names():
    assert list(scores.SCORE_FUNCS) == list(_scores.SCORE_FUNCS)
    assert list(activations.PLAIN) == list(NON_GATED)


@both_dtypes
@pytest.mark.parametrize("score_func", scores.SCORE_FUNCS)
@pytest.mark.parametrize("shape", [(7, 12), (3, 2, 5), (0, 4), (4, 0)])
def test_scores(score_func, dtype, shape):
    call = {"router_logits": as_strided_copy(4 * torch.randn(shape).to(dtype), "step2_last")}

    def of(module):
        return lambda router_logits: module.router_scores(router_logits, score_func)

    nearness.check(of(scores), of(_scores), call, ["router_logits"], sum_length=max(shape[-1], 1))


@pytest.mark.parametrize("score_func", scores.SCORE_FUNCS)
def test_scores_of_half_logits_are_float32(score_func):
    logits = torch.randn(4, 8).bfloat16()
    want = _scores.router_scores(logits.double(), score_func)
    got = scores.router_scores(logits, score_func)
    assert got.dtype == torch.float32
    assert_close_by_norm(got, want, 1 + want + logits.double().abs(), sum_length=8)


@both_dtypes
@pytest.mark.parametrize("score_func", ["sigmoid", "sqrtsoftplus"])
def test_scores_far_from_zero(score_func, dtype):
    logits = torch.tensor([*EDGES, torch.inf, torch.nan], dtype=dtype)
    got = scores.SCORE_FUNCS[score_func](logits)
    want = _scores.SCORE_FUNCS[score_func](logits.double())
    # The rounding of a logit x changes exp(x / 2) by x / 2 roundings.
    assert_close_by_norm(got, want, want * (1 + logits.double().abs().clamp(max=200)))


@both_dtypes
def test_gradients_of_sqrtsoftplus_are_finite(dtype):
    logits = torch.tensor(EDGES, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(scores.router_scores(logits, "sqrtsoftplus").sum(), logits)
    wide = logits.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(_scores.router_scores(wide, "sqrtsoftplus").sum(), wide)
    assert_close_by_norm(grad, want, want * (1 + wide.detach().abs().clamp(max=200)))


@both_dtypes
@pytest.mark.parametrize("activation", NON_GATED)
def test_plain_activations(activation, dtype):
    preact = torch.cat((4 * torch.randn(50), torch.tensor([0.0, torch.nan]))).to(dtype)

    def of(function):
        return lambda preact: function(preact, activation)

    nearness.check(of(activations.plain_act), of(plain_act), {"preact": preact}, sum_length=1)
    call = {"preact": preact[:50]}
    nearness.check(of(activations.plain_act), of(plain_act), call, ["preact"], sum_length=1)
    # The rule that backward passes take, without a graph.
    grad, leaf = torch.randn(50).to(dtype), preact[:50].double().requires_grad_()
    (want,) = torch.autograd.grad(plain_act(leaf, activation), leaf, grad.double())
    got = activations.plain_act_gradient(grad, call["preact"], activation)
    magnitude = grad.double().abs() * (1 + 2 * leaf.detach().abs())
    assert_close_by_norm(got, want, magnitude)


@both_dtypes
@pytest.mark.parametrize("activation", activations.GATES)
def test_gates(activation, dtype):
    def ours(gate, up):
        return activations.GATES[activation](gate) * up

    def theirs(gate, up):
        return gated_act(torch.cat((gate, up), -1), activation)

    call = {name: torch.randn(5, 9).to(dtype) for name in ("gate", "up")}
    nearness.check(ours, theirs, call, ["gate", "up"], sum_length=1)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match=r"activation must be one of silu, gelu.*, got 'mish'"):
        activations.plain_act(torch.zeros(3), "mish")

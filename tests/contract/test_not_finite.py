"""Tests that a number that is not finite reaches what it is a part of and nothing else: outputs and
gradients of other tokens, and of experts that the token does not use, keep their bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.helpers.ffn import ffn_operands
from tests.helpers.isas import has_own_kernels, run_python_at
from tests.helpers.routing import Routing

import moe_ops
from moe_ops import _library
from moe_ops.testing import DTYPES, assert_identical, seed_from, short

pytestmark = pytest.mark.cpu_only

TOKEN = 3
# By tokens, and by tokens of an expert, these take different kernels.
ROUTINGS = [
    Routing(5, 4, 2, "dropped"),
    Routing(40, 4, 2, "dropped"),
    Routing(150, 8, 2, "skewed"),
    Routing(500, 3, 1, "dropped"),
]


def moe_ffn(routing, dtype):
    return ffn_operands(routing, 37, 29, dtype, bias=True), ["x"]


def moe_ffn_of_scaled_tokens(routing, dtype):
    call, tokens = moe_ffn(routing, dtype)
    return {**call, "apply_router_weight_on_input": True}, tokens


def moe_linear_map(routing, dtype):
    experts = routing.num_experts
    call = {
        "x": torch.randn(routing.num_tokens, 37).to(dtype),
        "w": torch.randn(experts, 29, 37).to(dtype),
        "topk_ids": routing.ids(),
        "bias": torch.randn(experts, 29).to(dtype),
    }
    return call, ["x"]


def moe_linear_map_of_narrow_experts(routing, dtype):
    call, tokens = moe_linear_map(routing, dtype)
    return {**call, "x": call["x"][:, :5], "w": call["w"][:, :6, :5], "bias": None}, tokens


def moe_linear_reduce(routing, dtype):
    call = {
        "h": torch.randn(routing.num_tokens, routing.top_k, 29).to(dtype),
        "w": torch.randn(routing.num_experts, 37, 29).to(dtype),
        "topk_weights": torch.rand(routing.num_tokens, routing.top_k),
        "topk_ids": routing.ids(),
    }
    return call, ["h"]


MAKERS = {
    f: getattr(moe_ops, f.__name__.split("_of_")[0])
    for f in (
        moe_ffn,
        moe_ffn_of_scaled_tokens,
        moe_linear_map,
        moe_linear_map_of_narrow_experts,
        moe_linear_reduce,
    )
}


def run(op, call, grad=None):
    names = [n for n, t in call.items() if torch.is_tensor(t) and t.is_floating_point()]
    leaves = [call[n].detach().requires_grad_() for n in names]
    y = op(**{**call, **dict(zip(names, leaves, strict=True))})
    grad = torch.ones_like(y) if grad is None else grad
    return y.detach(), dict(zip(names, torch.autograd.grad(y, leaves, grad), strict=True))


def changed(tensor, rows, value):
    tensor = tensor.clone()
    tensor[rows] = value
    return tensor


def assert_others_kept(got, want, tokens, experts, what):
    assert_identical(got[0][tokens], want[0][tokens], f"output, {what}")
    for name, grad in got[1].items():
        rows = experts if name[0] in "wb" else tokens
        assert_identical(grad[rows], want[1][name][rows], f"gradient of {name}, {what}")


@pytest.mark.parametrize("maker", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_a_token_spoils_itself_and_its_experts(routing, dtype, maker):
    op, (call, names) = MAKERS[maker], maker(routing, dtype)
    call["topk_ids"][TOKEN] = 1  # of 3 experts or more
    grad = torch.randn_like(run(op, call)[0])
    want = run(op, call, grad)
    tokens = torch.arange(routing.num_tokens) != TOKEN
    experts = torch.arange(routing.num_experts) != 1
    for value in (math.nan, math.inf):
        for name in names:
            spoiled = {**call, name: changed(call[name], TOKEN, value)}
            got = run(op, spoiled, grad)
            assert not bool(got[0][TOKEN].isfinite().any())
            assert_others_kept(got, want, tokens, experts, f"{value} in {name}")
        got = run(op, call, changed(grad, TOKEN, value))
        assert_others_kept(got, want, tokens, experts, f"{value} in the gradient")


@pytest.mark.parametrize("maker", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_what_no_slot_uses_reaches_nothing(routing, dtype, maker):
    """An expert without tokens, a token without experts, weights of slots without an expert."""
    op, (call, _) = MAKERS[maker], maker(routing, dtype)
    ids = call["topk_ids"]
    ids[ids == 2] = -1
    ids[TOKEN] = -1
    grad = torch.randn_like(run(op, call)[0])
    want = run(op, call, grad)
    for name, t in call.items():
        if not torch.is_tensor(t) or not t.is_floating_point():
            continue
        unused = 2 if name[0] in "wb" else TOKEN
        call[name] = changed(t, ids < 0 if name == "topk_weights" else unused, math.nan)
    y, grads = run(op, call, changed(grad, TOKEN, math.nan))
    assert_identical(y, want[0])
    assert bool((y[TOKEN] == 0).all())
    for name, found in grads.items():
        assert_identical(found, want[1][name], f"gradient of {name}")
        if name[0] in "wb":
            assert bool((found[2] == 0).all()), name


def run_all(every: bool) -> None:
    """The routings of middle size, in a process of its own, at the level of instructions that it
    was started with; without `every`, types for which that level has kernels of its own."""
    for routing, dtype, maker in itertools.product(ROUTINGS[1:3], DTYPES, MAKERS):
        if every or has_own_kernels(_library.cpu_isa(), dtype):
            torch.manual_seed(seed_from(f"{routing} {dtype} {maker.__name__}"))
            test_a_token_spoils_itself_and_its_experts(routing, dtype, maker)
            test_what_no_slot_uses_reaches_nothing(routing, dtype, maker)


@pytest.mark.parametrize("isa", _library.supported_isas()[:-1])
def test_other_instruction_sets(isa, request):
    every = request.config.getoption("--full")
    code = f"from tests.contract.test_not_finite import run_all; run_all({every})"
    done = run_python_at(isa, "-c", code)
    assert done.returncode == 0, done.stderr[-3000:]

"""Tests of how `call` reaches an op: past the dispatcher in plain eager code, through it everywhere
else."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ops
from moe_ops.ops import _autograd

OP = torch.ops.moe_ops.moe_linear_map


@pytest.fixture
def rule_calls(monkeypatch):
    """One entry for each time that the rule of moe_linear_map is applied directly."""
    calls, rule = [], _autograd._direct_rules[OP]

    def counted(*args):
        calls.append(args)
        return rule(*args)

    monkeypatch.setitem(_autograd._direct_rules, OP, counted)
    return calls


def operands(**options):
    x = torch.randn(6, 5, **options)
    return x, torch.randn(3, 4, 5), torch.randint(3, (6, 2))


def test_plain_code_goes_past_the_dispatcher(rule_calls):
    x, w, ids = operands(requires_grad=True)
    y = moe_ops.moe_linear_map(x, w, ids)
    assert len(rule_calls) == 1
    (direct,) = torch.autograd.grad(y.sum(), x)
    y = OP(x, w, ids)
    assert len(rule_calls) == 1
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], direct)
    assert not moe_ops.moe_linear_map(x.detach(), w, ids).requires_grad
    with torch.no_grad():
        assert not moe_ops.moe_linear_map(x, w, ids).requires_grad
    assert len(rule_calls) == 1


def test_autocast_is_seen(rule_calls):
    x, w, ids = operands(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_ops.moe_linear_map(x, w, ids)
    assert y.dtype == torch.bfloat16 and not rule_calls
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


def test_modes_see_the_op(rule_calls):
    x, w, ids = operands(requires_grad=True)
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Dispatch():
        y = moe_ops.moe_linear_map(x, w, ids)
    assert OP.default in seen and y.requires_grad and not rule_calls
    seen.clear()
    with Function():
        y = moe_ops.moe_linear_map(x, w, ids)
    assert OP in seen and y.requires_grad


def test_subclasses_see_the_op(rule_calls):
    x, w, ids = operands()
    seen = []

    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = x.as_subclass(Sub).requires_grad_()
    y = moe_ops.moe_linear_map(x, w, ids)
    assert OP in seen and isinstance(y, Sub) and not rule_calls


def test_below_autograd_there_is_no_graph(rule_calls):
    x, w, ids = operands(requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        y = moe_ops.moe_linear_map(x, w, ids)
    assert y.grad_fn is None and not rule_calls


def test_arguments_left_out_have_their_defaults(rule_calls):
    """`bias` is not passed here, and backward asks for it."""
    x, w, ids = operands(requires_grad=True)
    rule = _autograd._direct_rules[OP]
    y = rule(x, w, ids)
    want = moe_ops.reference.moe_linear_map(x.detach(), w, ids)
    torch.testing.assert_close(y.detach(), want)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("op", ["moe_ffn", "all_experts_ffn"])
def test_ops_with_a_form_for_training_take_the_same_way(op, monkeypatch):
    """Their rule runs another op, which also returns what backward needs, and shows one output."""
    packet = getattr(torch.ops.moe_ops, op)
    calls, rule = [], _autograd._direct_rules[packet]
    monkeypatch.setitem(
        _autograd._direct_rules, packet, lambda *args: (calls.append(args), rule(*args))[1]
    )
    if op == "moe_ffn":
        ids = torch.randint(3, (6, 2))
        args = torch.randn(6, 5), torch.randn(3, 8, 5), torch.randn(3, 5, 4), torch.rand(6, 2), ids
    else:
        ids = torch.tensor([0, 1, 0])
        args = torch.randn(6, 2, 5), torch.randn(3, 4, 5), torch.randn(3, 7, 4), ids
    args[0].requires_grad_()
    y = getattr(moe_ops, op)(*args)
    assert len(calls) == 1 and isinstance(y, torch.Tensor)
    through_dispatcher = packet(*args)
    assert len(calls) == 1 and torch.equal(y, through_dispatcher)
    grads = [torch.autograd.grad(out.sum(), args[0])[0] for out in (y, through_dispatcher)]
    assert torch.equal(*grads)

"""torch.func's transforms and forward-mode AD: right, or refused with a sentence naming the op.

Forward mode is where silence is dangerous: an op that knows nothing of tangents drops them, and the
derivative that comes out is zero.
"""

from __future__ import annotations

import random
import zlib

import pytest
import torch
from tests.helpers.op_case import Sizes
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacrev, jvp, vjp, vmap

import moe_ops

from .every_op import CASES, OPS

pytestmark = [
    pytest.mark.cpu_only,
    # torch's loop over the entries of a batch.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

DIFFERENTIABLE, QUANTIZED, INTEGERS = (
    [op for op in OPS if CASES[op].kind == kind] for kind in ("float", "quantized", "integer")
)


def call_of(op: str) -> dict:
    sizes = Sizes(random.Random(zlib.crc32(op.encode())))
    quantized = CASES[op].kind == "quantized"
    sizes.dtype = torch.float32 if quantized else torch.float64
    call = CASES[op].call(sizes)
    if not quantized:
        call = {n: double(v) if isinstance(v, Tensor) else v for n, v in call.items()}
    return call


def double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


class Case:
    """An op as a function of those of its operands that it has a gradient for, to a number."""

    def __init__(self, op: str, module=moe_ops) -> None:
        torch.manual_seed(zlib.crc32(op.encode()))
        self.op, self.function, self.call = op, getattr(module, op), call_of(op)
        floats = {n: v for n, v in self.call.items() if is_float(v)}
        leaves = {n: v.clone().requires_grad_() for n, v in floats.items()}
        self.kept = None
        self.kept = [i for i, y in enumerate(self.outputs(**leaves)) if y.requires_grad]
        outputs = self.outputs(**leaves)
        self.cotangents = [torch.randn_like(y) for y in outputs]
        grads = torch.autograd.grad(outputs, leaves.values(), self.cotangents, allow_unused=True)
        self.gradients = {n: g for n, g in zip(floats, grads, strict=True) if g is not None}
        self.names = tuple(self.gradients)
        self.primals = tuple(floats[n] for n in self.names)
        self.tangents = tuple(torch.randn_like(v) for v in self.primals)

    def outputs(self, **changes) -> list[Tensor]:
        y = self.function(**{**self.call, **changes})
        outputs = y if isinstance(y, tuple) else (y,)
        return [y for i, y in enumerate(outputs) if self.kept is None or i in self.kept]

    def vector(self, *operands: Tensor) -> list[Tensor]:
        return self.outputs(**dict(zip(self.names, operands, strict=True)))

    def scalar(self, *operands: Tensor) -> Tensor:
        outputs = self.vector(*operands)
        return sum((y * c).sum() for y, c in zip(outputs, self.cotangents, strict=True))


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float64, torch.float32)


def close(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def refused(op: str, what: str = "forward-mode AD is not implemented"):
    op = "moe_ffn" if op == "moe_ffn_packed" else op  # what it runs for a derivative
    return pytest.raises(NotImplementedError, match=rf"^{op}: (?s:.*){what}.*\.$")


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_is_refused(op):
    case = Case(op)
    with refused(op):
        jvp(case.vector, case.primals, case.tangents)
    with refused(op), torch.no_grad():
        jvp(case.vector, case.primals, case.tangents)
    for position in range(len(case.names)):
        with forward_ad.dual_level():
            dual = list(case.primals)
            dual[position] = forward_ad.make_dual(dual[position], case.tangents[position])
            with refused(op):
                case.vector(*dual)
            with refused(op), torch.no_grad():
                case.vector(*dual)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_reference_has_forward_mode(op):
    """The reference has forward mode, as the sentence promises."""
    case = Case(op, moe_ops.reference)
    _, change = jvp(case.scalar, case.primals, case.tangents)
    wanted = sum((t * g).sum() for t, g in zip(case.tangents, case.gradients.values(), strict=True))
    close(change, wanted)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_calls_of_the_op_itself(op):
    case = Case(op)
    overload = getattr(torch.ops.moe_ops, op)
    seen = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is overload.default:
                seen.append((args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Calls(), torch.no_grad():
        case.vector(*case.primals)
    (args, kwargs), *_ = seen
    which = next(i for i, a in enumerate(args) if is_float(a))

    def scalar(t: Tensor) -> Tensor:
        outputs = overload(*args[:which], t, *args[which + 1 :], **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(y.square().sum() for y in outputs if y.is_floating_point())

    leaf = args[which].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(scalar(leaf), leaf)
    close(grad(scalar)(args[which]), wanted)
    with refused(op):
        jvp(scalar, (args[which],), (args[which],))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_no_tangents_no_refusal(op):
    case = Case(op)
    wanted = case.vector(*case.primals)
    leaves = [p.clone().requires_grad_() for p in case.primals]
    with forward_ad.dual_level():
        assert all(map(torch.equal, case.vector(*case.primals), wanted))
        grads = torch.autograd.grad(case.scalar(*leaves), leaves)
    assert all(map(torch.equal, grads, case.gradients.values()))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_grad(op):
    case = Case(op)
    every = tuple(range(len(case.names)))
    close(grad(case.scalar, every)(*case.primals), tuple(case.gradients.values()))
    with torch.no_grad():
        close(grad(case.scalar)(*case.primals), case.gradients[case.names[0]])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivative(op):
    case = Case(op)
    leaf = case.primals[0].clone().requires_grad_()
    rest = case.primals[1:]
    if not CASES[op].twice:
        with refused(op, "the second derivative is not implemented"):
            grad(lambda t: grad(case.scalar)(t, *rest).square().sum())(leaf.detach())
        with refused(op, "(forward-mode AD|the second derivative) is not implemented"):
            hessian(lambda t: case.scalar(t, *rest))(leaf.detach())
        return

    def squared(t: Tensor) -> Tensor:
        return sum(y.pow(3).sum() for y in case.vector(t, *rest))

    (first,) = torch.autograd.grad(squared(leaf), leaf, create_graph=True)
    (wanted,) = torch.autograd.grad(first.square().sum(), leaf)
    close(grad(lambda t: grad(squared)(t).square().sum())(leaf.detach()), wanted)
    with refused(op):
        hessian(squared)(leaf.detach())


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap(op):
    case = Case(op)
    batch = torch.stack([case.primals[0], case.primals[0].flip(-1) * 0.5, case.primals[0] + 0.25])
    rest = case.primals[1:]
    outputs = vmap(lambda t: tuple(case.vector(t, *rest)))(batch)
    for i, t in enumerate(batch):
        close(tuple(y[i] for y in outputs), tuple(case.vector(t, *rest)))
    leaf = batch.clone().requires_grad_()
    (through,) = torch.autograd.grad(vmap(lambda t: case.scalar(t, *rest))(leaf).sum(), leaf)
    per_sample = vmap(grad(lambda t: case.scalar(t, *rest)))(batch)
    close(through, per_sample)
    close(per_sample, torch.stack([grad(case.scalar)(t, *rest) for t in batch]))
    last = vmap(grad(lambda t: case.scalar(t, *rest)), in_dims=-1, out_dims=-1)
    close(last(batch.movedim(0, -1)), per_sample.movedim(0, -1))


def test_vmap_of_tokens_is_one_call():
    """A batch of tokens, along any dimension, gets the bits of one call with all of them."""
    x, w_gate_up, w_down = torch.randn(5, 3, 8), torch.randn(4, 6, 8), torch.randn(4, 8, 3)
    weights, ids = torch.rand(5, 2), torch.randint(4, (5, 3, 2))
    got = vmap(
        lambda tokens, chosen: moe_ops.moe_ffn(tokens, w_gate_up, w_down, weights, chosen),
        in_dims=(1, 1),
        out_dims=1,
    )(x, ids)
    rows = [t.movedim(1, 0).flatten(0, 1) for t in (x, ids)]
    y = moe_ops.moe_ffn(rows[0], w_gate_up, w_down, weights.repeat(3, 1), rows[1])
    assert torch.equal(got, y.unflatten(0, (3, 5)).movedim(0, 1))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_jacrev_and_vjp(op):
    case, reference = Case(op), Case(op, moe_ops.reference)
    reference.names, reference.kept = case.names, case.kept
    rest = case.primals[1:]
    close(
        jacrev(lambda t: case.vector(t, *rest)[0])(case.primals[0]),
        jacrev(lambda t: reference.vector(t, *rest)[0])(case.primals[0]),
    )
    # Outside of the transform, its saved tensors are wrappers of a level that is no more.
    _, pull = vjp(lambda *operands: tuple(case.vector(*operands)), *case.primals)
    close(pull(tuple(case.cotangents)), tuple(case.gradients.values()))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_functionalize(op):
    case = Case(op)
    got = functionalize(lambda *operands: case.vector(*operands))(*case.primals)
    assert all(map(torch.equal, got, case.vector(*case.primals)))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_autocast(op):
    case = Case(op)
    operands = tuple(p.float() for p in case.primals)
    case.call = {n: v.float() if is_float(v) else v for n, v in case.call.items()}
    case.cotangents = [c.float() for c in case.cotangents]
    leaves = [p.clone().requires_grad_() for p in operands]
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.autograd.grad(case.scalar(*leaves), leaves)
        got = grad(case.scalar, tuple(range(len(operands))))(*operands)
    assert [g.dtype for g in got] == [p.dtype for p in operands]
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("op", ["gated_act", "moe_ffn", "topk_router"])
def test_compile(op):
    case = Case(op)
    got = torch.compile(grad(case.scalar), fullgraph=True)(*case.primals)
    close(got, case.gradients[case.names[0]])


@pytest.mark.parametrize(
    "op", sorted(set(QUANTIZED) - {"grouped_gemm_quantized", "moe_ffn_quantized"})
)
def test_ops_of_inference(op):
    call = call_of(op)
    name = next(n for n, v in call.items() if is_float(v))

    def function(t: Tensor) -> Tensor:
        y = getattr(moe_ops, op)(**{**call, name: t})
        return y[-1] if isinstance(y, tuple) else y

    with refused(op):
        jvp(function, (call[name],), (call[name],))
    with forward_ad.dual_level():
        with refused(op):
            function(forward_ad.make_dual(call[name], call[name]))
        assert torch.equal(function(call[name]), function(call[name]))
    with refused(op, "it has no gradient"):
        grad(lambda t: function(t).float().sum())(call[name])
    batch = torch.stack([call[name], call[name] * 0.5])
    if not op.endswith("attention_decode"):  # torch's loop over a batch takes no op that writes.
        for y, t in zip(vmap(function)(batch), batch, strict=True):
            torch.testing.assert_close(y, function(t))  # More rows may be summed otherwise.


@pytest.mark.parametrize("op", INTEGERS)
def test_ops_of_integers(op):
    call = call_of(op)
    y = getattr(moe_ops, op)(**call)
    with forward_ad.dual_level():
        dual = {n: forward_ad.make_dual(v, v) if is_float(v) else v for n, v in call.items()}
        assert_same_integers(getattr(moe_ops, op)(**dual), y)
    name = next(n for n, v in call.items() if isinstance(v, Tensor))
    got = vmap(lambda t: getattr(moe_ops, op)(**{**call, name: t}))(torch.stack([call[name]] * 2))
    first = tuple(t[1] for t in got) if isinstance(got, tuple) else got[1]
    assert_same_integers(first, y)


def assert_same_integers(got, wanted) -> None:
    pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
    for a, b in pairs:
        assert not a.is_floating_point() and torch.equal(a, b)


def test_every_op_is_here():
    assert set(DIFFERENTIABLE) | set(QUANTIZED) | set(INTEGERS) == set(moe_ops.ops.__all__)


def test_main_grads_under_transforms():
    case = Case("moe_ffn")
    buffers = (torch.zeros_like(case.call["w_gate_up"]), None)
    with refused("moe_ffn", "main_grads"):
        grad(lambda x: moe_ops.moe_ffn(**{**case.call, "x": x}, main_grads=buffers).sum())(
            case.call["x"]
        )
    with forward_ad.dual_level(), refused("moe_ffn"):
        x = forward_ad.make_dual(case.call["x"], case.call["x"])
        w = case.call["w_gate_up"].clone().requires_grad_()
        moe_ops.moe_ffn(**{**case.call, "x": x, "w_gate_up": w}, main_grads=buffers)

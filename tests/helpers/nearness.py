"""Comparing a formula with its reference, within the rounding that operands and sums justify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ops.testing import assert_same_places, eps

Call = dict[str, Any]
Function = Callable[..., Any]
_STEP = 2.0**-24  # Relative size of a change whose effect is linear in fp64.


def run(function: Function, call: Call, wrt: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Returns the floating outputs of a call by number, the operands that it writes in place, and
    the gradients of random sums of outputs by name."""
    own = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in call.items()}
    for name in wrt:
        own[name] = call[name].detach().requires_grad_()
    found = function(**own)
    outputs = [found] if isinstance(found, Tensor) else [t for t in found if t is not None]
    results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    results |= {
        n: own[n].detach()
        for n, v in call.items()
        if isinstance(v, Tensor) and n not in wrt and not same(own[n], v)
    }
    if wrt:
        torch.manual_seed(seed)
        through = [t for t in outputs if t.requires_grad]
        grads = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in through]
        leaves = [own[n] for n in wrt]
        of_leaves = torch.autograd.grad(through, leaves, grads, materialize_grads=True)
        results |= {f"gradient of {n}": g for n, g in zip(wrt, of_leaves, strict=True)}
    return results


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def changed(call: Call, seed: int) -> Call:
    """Returns the call in fp64, each number changed by a random relative step."""
    torch.manual_seed(seed)
    return {
        n: v * (1 + _STEP * torch.randn_like(v))
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for n, v in wide(call).items()
    }


def wide(call: Call) -> Call:
    return {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in call.items()
    }


def check(
    formula: Function,
    reference: Function,
    call: Call,
    wrt: Sequence[str] = (),
    *,
    sum_length: int,
) -> dict[str, Tensor]:
    """Compares outputs and gradients with the reference in fp64.

    The bound of an error's norm is what a relative change of all operands by a rounding does to the
    reference, times the growth of rounding in sums of `sum_length` terms, and the rounding of the
    result itself. NaN and infinities must be in the same places.
    """
    got = run(capturable(formula), call, wrt, 1)
    want, moved = (run(reference, c, wrt, 1) for c in (wide(call), changed(call, 2)))
    assert got.keys() == want.keys()
    unit = max(
        eps(v.dtype) for v in call.values() if isinstance(v, Tensor) and v.is_floating_point()
    )
    for name, exact in want.items():
        ours = got[name].double()
        assert ours.shape == exact.shape, f"{name}: {list(ours.shape)} and {list(exact.shape)}"
        assert_same_places(ours.isnan(), exact.isnan(), ours, exact, f"{name}: NaN")
        assert_same_places(ours.isinf(), exact.isinf(), ours, exact, f"{name}: infinity")
        finite = exact.isfinite()
        error = (ours - exact)[finite].norm()
        response = (moved[name] - exact)[finite].norm() / _STEP
        terms = 8 + 4 * sum_length**0.5
        bound = unit * (terms * response + 2 * exact[finite].norm())
        assert error <= bound + torch.finfo(torch.float32).smallest_normal, (
            f"{name}: error {error.item():.3e} is above {bound.item():.3e}, of norm "
            f"{exact[finite].norm().item():.3e}"
        )
    return got


class WithoutHost(TorchDispatchMode):
    """Refuses operations that wait for a device or copy from the host: a CUDA graph has none."""

    REFUSED = (
        "lift_fresh",
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "item",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} cannot be captured"
        return func(*args, **(kwargs or {}))


def capturable(function: Function) -> Function:
    """Returns the function, which then fails where it could not be captured in a CUDA graph."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with WithoutHost():
            return function(*args, **kwargs)

    return run

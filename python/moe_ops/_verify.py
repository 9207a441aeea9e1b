"""Comparisons of fused modules with their own forward while a model is in use.

One in n calls of each fused module is computed twice. `optimize(verify=n)` or the environment
variable MOE_OPS_VERIFY sets n.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_moe_ops_verify"
# Maximum relative differences (norms) from rounding. 8-bit and 4-bit weights are compared with
# their dequantized values, while the kernels round tokens to 8 bits.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_QUANTIZED = 8e-2


class _State(threading.local):
    """The number of open `own_forwards` blocks in a thread."""

    depth = 0


_state = _State()
_active = False


class VerificationError(RuntimeError):
    """Raised if a fused module and its own forward differ."""


class Check:
    """Calls of one module.

    Args:
        name: the module's name in messages.
        every: number of calls per comparison.
        warn: warn of a difference instead of raising.
    """

    def __init__(self, name: str, every: int, warn: bool) -> None:
        self.name, self.every, self.warn, self.calls = name, every, warn, 0


def parse(verify: int | str | None) -> tuple[int, bool]:
    """Returns the number of calls per comparison, 0 for none, and whether to only warn.

    Args:
        verify: a number; "n" or "warn:n"; None is the environment variable MOE_OPS_VERIFY.

    Raises:
        ValueError: anything else.
    """
    given = os.environ.get("MOE_OPS_VERIFY", "0") if verify is None else verify
    text = str(given)
    warn, number = text.startswith("warn:"), text.removeprefix("warn:")
    if isinstance(given, bool) or not number.isdecimal():
        raise ValueError(
            "verify (MOE_OPS_VERIFY) must be a number of calls, 0 for never, or 'warn:' and a "
            f"number, got {given!r}."
        )
    return int(number), warn


def watch(modules: dict[str, nn.Module], every: int, warn: bool) -> None:
    """Compares one call in `every` of each of these modules from now on; 0 stops it."""
    global _active
    for name, module in modules.items():
        if every:
            module.__dict__[_ATTRIBUTE] = Check(name, every, warn)
            _active = True
        else:
            module.__dict__.pop(_ATTRIBUTE, None)


def is_active() -> bool:
    """Returns whether any module of this process has been watched."""
    return _active


def is_due(module: nn.Module) -> bool:
    """Counts a call of a module and returns whether to compare it."""
    if not _active or torch.compiler.is_compiling():
        return False
    check = module.__dict__.get(_ATTRIBUTE)
    if check is None or _state.depth:
        return False
    check.calls += 1
    return bool(check.calls % check.every == 0)


def takes_own_forward() -> bool:
    """Returns whether fused modules of this thread must use their own forward now."""
    return _active and _state.depth > 0


@contextlib.contextmanager
def own_forwards() -> Iterator[None]:
    """Makes fused modules of this thread use their own forward inside the block."""
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1


def compare(
    module: nn.Module,
    what: str,
    ours: Tensor,
    own: Callable[[], Tensor],
    *,
    quantized: bool = False,
) -> None:
    """Compares an output with that of the module's own forward.

    Raises:
        VerificationError: they differ by more than rounding, unless the check only warns.
    """
    with torch.no_grad(), own_forwards():
        theirs = own()
    tolerance = _QUANTIZED if quantized else _TOLERANCES.get(ours.dtype, 5e-2)
    _judge(module, what, ours.detach(), theirs, tolerance)


def compare_choice(
    router: nn.Module, ours: tuple[Tensor, ...], own: Callable[[], tuple[Tensor, ...]]
) -> None:
    """Compares a router's logits, and the weights of all experts for tokens whose top-k selection
    cannot change by rounding of logits.

    Raises:
        VerificationError: they differ by more than rounding, unless the check only warns.
    """
    with torch.no_grad(), own_forwards():
        theirs = own()
    tolerance = _TOLERANCES.get(theirs[0].dtype, 5e-2)
    logits, weights, ids = (t.detach() for t in ours)
    _judge(router, "router logits", logits, theirs[0], tolerance)
    mine = torch.zeros_like(logits, dtype=torch.float32).scatter(1, ids.long(), weights.float())
    other = torch.zeros_like(mine).scatter(1, theirs[2].long(), theirs[1].float())
    same = ((mine > 0) == (other > 0)).all(1)
    if bool(same.float().mean() < 0.5):
        same[:] = True  # More tokens with other experts than ties explain.
    _judge(router, "routing weights", mine[same], other[same], max(tolerance, 2e-2))


def _judge(module: nn.Module, what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    check: Check = module.__dict__[_ATTRIBUTE]
    if ours.shape != theirs.shape:
        error, bad = float("inf"), True
    else:
        a, b = ours.double(), theirs.double()
        a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
        scale = float(b.norm())
        error = float((a - b).norm()) / scale if scale else float(a.norm())
        finite = bool(torch.equal(ours.isfinite(), theirs.isfinite()))
        bad = not error <= tolerance or not finite
    if not bad:
        return
    message = (
        f"verify: the {what} of {check.name} in its call {check.calls} differs from the module's "
        f"own forward by {error:.2g} of its size, where rounding makes at most {tolerance:.2g}."
    )
    if not check.warn:
        raise VerificationError(message)
    warnings.warn(message, stacklevel=2)

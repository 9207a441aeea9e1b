"""Comparison of an op with its reference: unusual views of tensors, poisoned memory, rounding
bounds.

Bounds are derived from the operands: an op is compared with its fp64 reference, and the allowed
error of each element is a small multiple of eps times the same computation on absolute values. No
absolute tolerance is chosen by hand.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library
from .reference._common import acc_dtype as acc_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int32, torch.int64)
VIEWS = ("contiguous", "transposed", "offset", "step2", "expanded")


def short(dtype: torch.dtype) -> str:
    """Returns the dtype's name in test ids: fp64, fp32, bf16, fp16, int32, int64."""
    name = str(dtype).removeprefix("torch.")
    return {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(
        name, name
    )


def seed_from(node_id: str) -> int:
    """Returns a seed derived from the test's name, so that a test has the same data when it runs
    alone."""
    return zlib.crc32(node_id.encode())


# ------------------------------------------------------------------------------------------ views


def as_strided_copy(t: Tensor, kind: str) -> Tensor:
    """Returns a tensor equal to `t` with another layout in memory; gaps between its elements
    contain NaN.

    contiguous; transposed (the last two dimensions swapped in memory); offset (starts one element
    into its storage, so vector loads are misaligned); step2 (every second row of the first
    dimension); step2_last (every second element of the last dimension); expanded (the first row
    repeated with stride 0: equal to `t` only in its first row, so callers must use the result's
    values).
    """
    hole = torch.nan if t.is_floating_point() else -7
    if kind == "contiguous":
        return t.contiguous()
    if kind == "transposed":
        return t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "offset":
        flat = t.new_full((t.numel() + 1,), hole)
        view = flat[1:].view(t.shape)
        return view.copy_(t)
    if kind == "step2":
        if t.dim() == 0:
            return t
        holes = t.new_full((2 * t.shape[0], *t.shape[1:]), hole)
        return holes[::2].copy_(t)
    if kind == "step2_last":
        holes = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), hole)
        return holes[..., ::2].copy_(t)
    if kind == "expanded":
        return t if t.dim() == 0 or t.shape[0] == 0 else t[:1].clone().expand(t.shape)
    raise ValueError(f"as_strided_copy: unknown kind {kind!r}")


_POISONED_SCRATCH = 256 << 10  # bytes of each block; small calls reach no further


@contextlib.contextmanager
def poisoned(*like: Tensor) -> Iterator[None]:
    """Fills memory from torch.empty inside the block with NaN (or 0xff bytes) where possible, and
    also the scratch memory of this thread's CPU kernels.

    It uses two methods: torch's own fill of uninitialized memory, and freed NaN blocks with the
    sizes of `like` for allocations that bypass it.
    """
    _library.poison_scratch(_POISONED_SCRATCH)
    sizes = {256, 4096, 65536} | {max(1, t.numel() * t.element_size()) for t in like}
    blocks = [
        torch.full((size + pad,), 0xFF, dtype=torch.uint8)
        for size in sizes
        for pad in (0, 0, 0, 64, 512)
    ]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    del blocks
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ----------------------------------------------------------------------------------------- bounds


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def assert_close_by_norm(
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    *,
    sum_length: int = 1,
    steps: int = 0,
    step_dtype: torch.dtype | None = None,
    what: str = "output",
) -> None:
    """Asserts that `actual` equals the fp64 `expected` up to the rounding of its dtype and the op's
    sums.

    magnitude: fp64, elementwise: the same computation on absolute values, e.g. |a| @ |b|.
    sum_length: number of products in a sum; its rounding grows with the square root.
    steps: number of intermediate results that the op may round to `step_dtype` (default: that of
    `actual`).

    NaN and infinities must be at exactly the same positions. In addition to each element, the norm
    of the whole error is checked: rounding errors are independent, so it is far below the sum of
    bounds.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    dtype = actual.dtype
    wide = actual.detach().double()
    expected = expected.detach().double()
    magnitude = magnitude.detach().double().expand_as(expected)
    rounded = expected.to(dtype)
    if not bool((wide.isfinite() & rounded.isfinite()).all()):
        assert_same_places(wide.isnan(), expected.isnan(), wide, expected, f"{what}: NaN")
        for infinity in (torch.inf, -torch.inf):
            assert_same_places(
                wide == infinity, rounded == infinity, wide, expected, f"{what}: {infinity}"
            )
        finite = rounded.isfinite()
        wide, expected, magnitude = (torch.where(finite, t, 0) for t in (wide, expected, magnitude))

    error = (wide - expected).abs_()
    terms = 8 + 4 * sum_length**0.5
    step_eps = eps(step_dtype or dtype)
    floor = max(torch.finfo(dtype).smallest_normal, torch.finfo(torch.float32).smallest_normal)
    if dtype == torch.float16:
        floor = 2.0**-24
    bound = (0.5 * eps(acc_dtype(dtype)) * terms + 0.5 * step_eps * steps) * magnitude
    bound.add_(expected.abs(), alpha=0.51 * eps(dtype)).add_(floor)
    within = error <= bound
    if not bool(within.all()):
        worst = (error / bound).argmax()
        at = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
        raise AssertionError(
            f"{what}: {int((~within).sum())} of {error.numel()} elements out of bound; worst at "
            f"{at}: got {wide[at].item()!r}, expected {expected[at].item()!r}, error "
            f"{error[at].item():.3e} is {(error[at] / bound[at]).item():.2f} times the bound "
            f"{bound[at].item():.3e} ({short(dtype)}, sums of {sum_length}, {steps} rounded steps)"
        )
    if error.numel() >= 256:
        norm_bound = (
            (eps(dtype) + step_eps * steps**0.5) * expected.norm()
            + (4 + sum_length**0.5 / 2) * eps(acc_dtype(dtype)) * magnitude.norm()
            + floor * error.numel() ** 0.5
        )
        assert error.norm() <= norm_bound, (
            f"{what}: the error's norm {error.norm().item():.3e} exceeds {norm_bound.item():.3e} "
            f"(norm of the expected value {expected.norm().item():.3e}, {short(dtype)})"
        )


def assert_same_places(
    actual: Tensor, wanted: Tensor, got: Tensor, expected: Tensor, what: str
) -> None:
    if torch.equal(actual, wanted):
        return
    at = tuple(int(i) for i in (actual != wanted).nonzero()[0])
    raise AssertionError(
        f"{what} at the wrong places, first at {at}: got {got[at].item()!r}, "
        f"expected {expected[at].item()!r}"
    )


def assert_identical(actual: Tensor, expected: Tensor, what: str = "output") -> None:
    """Asserts equal dtypes and shapes, and bitwise identical values (NaN equals NaN)."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {at}: got "
            f"{actual[at].item()!r}, expected {expected[at].item()!r}"
        )


# ------------------------------------------------------------------------- running op and reference

Kwargs = dict[str, Any]


def widened(kwargs: Kwargs) -> Kwargs:
    """Returns the arguments in fp64."""
    return {k: v.double() if _is_float(v) else v for k, v in kwargs.items()}


def absolute(kwargs: Kwargs) -> Kwargs:
    """Returns the absolute values of the arguments in fp64, on which a multilinear op computes its
    magnitude."""
    return {k: v.double().abs() if _is_float(v) else v for k, v in kwargs.items()}


def _is_float(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


def run_with_grads(
    fn: Callable[..., Tensor], kwargs: Kwargs, wrt: Sequence[str], grad: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns fn(**kwargs) and the gradients of <output, grad> by name."""
    out, leaves = _with_leaves(fn, kwargs, wrt)
    return out.detach(), {} if grad is None else _gradients(out, leaves, grad)


def _with_leaves(
    fn: Callable[..., Tensor], kwargs: Kwargs, wrt: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns fn(**kwargs), and by name the leaves that stand in for the operands `wrt`."""
    leaves = {name: kwargs[name].detach().requires_grad_() for name in wrt}
    return fn(**{**kwargs, **leaves}), leaves


def _gradients(out: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    if not leaves:
        return {}
    grads = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def check_against_reference(
    op: Callable[..., Tensor],
    ref: Callable[..., Tensor],
    kwargs: Kwargs,
    wrt: Sequence[str] = (),
    *,
    magnitude: Callable[..., Tensor] | None = None,
    sum_length: int = 1,
    steps: int = 0,
    grad_steps: int | None = None,
    grad_view: str = "contiguous",
    out_dtype: torch.dtype | None = None,
) -> None:
    """Checks output and gradients of `op` against the fp64 reference, in poisoned memory.

    magnitude: a function of absolute operands whose value and gradients bound the op's; default:
    the reference, which is correct for every multilinear op.
    steps, grad_steps: allowed roundings of intermediate results (see assert_close_by_norm) of the
    output and of the gradients; grad_steps defaults to steps.
    out_dtype: dtype of the output and of its gradient; None: that of the first operand.
    """
    magnitude = magnitude or ref
    lead = next(v for v in kwargs.values() if _is_float(v))
    out_dtype = out_dtype or lead.dtype
    expected, leaves = _with_leaves(ref, widened(kwargs), wrt)
    grad = as_strided_copy(torch.randn(expected.shape).to(out_dtype), grad_view)
    wide_grad = grad.double()
    expected_grads = _gradients(expected, leaves, wide_grad)
    bound, bound_grads = run_with_grads(magnitude, absolute(kwargs), wrt, wide_grad.abs())
    with poisoned(lead, expected.to(out_dtype)):
        out, grads = run_with_grads(op, kwargs, wrt, grad)

    assert out.dtype == out_dtype, f"output is {out.dtype}, expected {out_dtype}"
    assert_close_by_norm(
        out, expected, bound, sum_length=sum_length, steps=steps, step_dtype=lead.dtype
    )
    for name in wrt:
        assert grads[name].dtype == kwargs[name].dtype, f"gradient of {name}: {grads[name].dtype}"
        assert_close_by_norm(
            grads[name],
            expected_grads[name],
            bound_grads[name],
            sum_length=sum_length,
            steps=steps if grad_steps is None else grad_steps,
            # A weight's fp32 gradient from half-precision rows has the rounding of those rows.
            step_dtype=lead.dtype,
            what=f"gradient of {name}",
        )

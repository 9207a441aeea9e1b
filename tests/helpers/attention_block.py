"""Calls of ops that do a block of attention and write what they keep in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moe_ops
from moe_ops import reference
from moe_ops.testing import assert_identical, eps, poisoned

Call = dict[str, Any]


def run(function: Any, call: Call, kept: tuple[str, str]) -> tuple[Tensor, Tensor, Tensor]:
    """y and what is kept; the tensors of the call stay as they are."""
    own = {name: call[name].clone() for name in kept}
    return function(**{**call, **own}), own[kept[0]], own[kept[1]]


def wide(call: Call) -> Call:
    return {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in call.items()
    }


def check(
    op: str,
    call: Call,
    kept: tuple[str, str],
    exact: Call | None = None,
    tolerance: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op against its reference in fp64. Of what is kept, tokens after the new ones may be
    anything. exact: the call of the reference; None: the same."""
    dtype = call["x"].dtype
    # A few roundings to dtype on the way, and sums of as many terms as these tests have.
    tolerance = 30 * eps(dtype) if tolerance is None else tolerance
    with poisoned(call["x"]):
        got = run(getattr(moe_ops, op), call, kept)
    start, end = call["start"], call["start"] + call["x"].shape[1]
    want = run(getattr(reference, op), wide(call if exact is None else exact), kept)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        if ours is not got[0]:
            ours, theirs = ours[:, :, :end], theirs[:, :, :end]
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    for after, name in zip(got[1:], kept, strict=True):
        assert_identical(after[:, :, :start], call[name][:, :, :start])
        assert_identical(after[:, :, end:], call[name][:, :, end:])
    return got


def mask_of(kind: str, batch: int, length: int, end: int) -> Tensor:
    """Some of the tokens before a query's own, and its own: "bool", or "float"."""
    sees = torch.ones(length, end, dtype=torch.bool).tril(end - length).expand(batch, 1, -1, -1)
    sees = sees & (torch.rand(batch, 1, 1, end) < 0.7)
    sees[..., end - length :] |= torch.eye(length, dtype=torch.bool)
    return sees if kind == "bool" else torch.zeros(sees.shape).masked_fill(~sees, -1e9)


def sorted_call(op: str, call: Call) -> list[Any]:
    """All arguments in the order of the schema."""
    schema = getattr(torch.ops.moe_ops, op).default._schema
    return [call.get(a.name, a.default_value) for a in schema.arguments]

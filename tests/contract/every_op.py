"""One right call of every op, and of its backward, for tests of what holds for all of them.

The calls are those of the tables OP_CASES in tests/ops: a new op has one there and none here.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tests.helpers.op_case import FLOATS, OpCase, Sizes
from torch import Tensor

import moe_ops

CASES: dict[str, OpCase] = {}
for path in sorted((Path(__file__).parents[1] / "ops").glob("test_*.py")):
    CASES |= importlib.import_module(f"tests.ops.{path.stem}").OP_CASES
OPS = tuple(CASES)


class LargerSizes(Sizes):
    """Enough work for two threads."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(random.Random(0))
        self.t, self.h, self.i, self.o, self.e, self.k = 70, 120, 96, 72, 5, 2
        self.n = self.t * self.k
        self.dtype = dtype


def operands_of(op: str, dtype: torch.dtype, seed: int = 1) -> dict:
    torch.manual_seed(seed)
    return CASES[op].call(LargerSizes(dtype))


def tensors_in(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors_in(part)] if isinstance(result, tuple) else []


def forward_of(op: str, call: dict) -> Callable[[], list[Tensor]]:
    return lambda: tensors_in(getattr(moe_ops, op)(**call))


def backward_of(
    op: str, call: dict, grad_view: Callable[[Tensor], Tensor] = lambda t: t
) -> Callable[[], list[Tensor]] | None:
    """The gradients of the outputs by all operands; None where the op has none. `grad_view` lays
    out the gradients of the outputs in memory."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in call.items()
        if isinstance(value, Tensor) and value.dtype in FLOATS
    }
    if not leaves:
        return None
    try:
        outputs = tensors_in(getattr(moe_ops, op)(**{**call, **leaves}))
    except (RuntimeError, ValueError, NotImplementedError):  # for inference only, and says so
        return None
    outputs = [t for t in outputs if t.requires_grad]
    if not outputs:
        return None
    torch.manual_seed(2)
    grads = [grad_view(torch.randn_like(t)) for t in outputs]

    def run() -> list[Tensor]:
        found = torch.autograd.grad(
            outputs, list(leaves.values()), grads, retain_graph=True, allow_unused=True
        )
        return [t for t in found if t is not None]

    return run

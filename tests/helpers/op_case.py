"""The facts that the tests of all ops need to know of one.

Each tests/ops/test_<op>.py has a table OP_CASES of its ops, from which tests/contract/every_op.py
makes that of all.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._error_kinds import LOST

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What an op raises for bad input when it is called as torch.ops.moe_ops.*, apart from the functions
# of moe_ops: torch 2.15 and later do not pass on the kind.
BARE_OP_ERROR = RuntimeError if LOST else ValueError


class Sizes:
    """Sizes that are all different, so that a swapped dimension never fits by accident."""

    def __init__(self, rng: random.Random) -> None:
        self.t, self.h, self.i, self.o, self.e = rng.sample(range(2, 12), 5)
        self.k = rng.randint(1, min(self.e, 3))
        self.n = self.t * self.k
        self.dtype = rng.choice(FLOATS)
        self.id_dtype = rng.choice((torch.int32, torch.int64))

    def float(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)

    def narrow(self, *shape: int) -> Tensor:
        t = self.float(*shape)
        return t.float() if self.dtype == torch.float64 else t

    def weights(self) -> Tensor:
        return torch.rand(self.t, self.k)

    def ids(self) -> Tensor:
        return torch.randint(-1, self.e, (self.t, self.k)).to(self.id_dtype)

    def offsets(self) -> Tensor:
        cuts = sorted(torch.randint(0, self.n + 1, (self.e,)).tolist())
        return torch.tensor([0, *cuts], dtype=torch.int32)

    def order(self) -> Tensor:
        return torch.randperm(self.n).to(torch.int32)

    def ffn(self) -> dict[str, Any]:
        """A call of moe_ffn."""
        return {
            "x": self.float(self.t, self.h),
            "w_gate_up": self.float(self.e, 2 * self.i, self.h),
            "w_down": self.float(self.e, self.h, self.i),
            "topk_weights": self.weights(),
            "topk_ids": self.ids(),
            "b_gate_up": self.float(self.e, 2 * self.i),
            "b_down": self.float(self.e, self.h),
            "activation": "swiglu",
        }


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One op.

    call: the operands of a right call, by name.
    free_dims: of an operand, the dimensions that may have another size and leave the call right.
    bad_arguments: of an argument, values that must be refused.
    mixed_floats: operands whose dtype may differ from that of the others; None: all may.
    by_token: the operands that have tokens in their first dimension, if the op maps tokens to
        tokens and a token's output must not depend on the others (tests of batch invariance).
    kind: "float" of ops with a gradient; "quantized" of those that compute in lower types whatever
        the dtype of their operands; "integer" of those whose results are integers.
    twice: whether there is a second derivative. Other ops raise.
    too_many_bytes: a call whose result takes 2^63 bytes or more. Expanded and empty operands make
        it cheap.
    """

    call: Callable[[Sizes], dict[str, Any]]
    free_dims: Mapping[str, Collection[int]] = dataclasses.field(default_factory=dict)
    bad_arguments: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    mixed_floats: Collection[str] | None = None
    by_token: tuple[str, ...] = ()
    kind: str = "float"
    twice: bool = False
    too_many_bytes: Callable[[], object] | None = None


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones in the memory of one."""
    return torch.ones((), dtype=dtype).expand(shape)


def map_of(*shape: int) -> Tensor:
    """Zeros in the memory of one, as an index."""
    return torch.zeros((), dtype=torch.int32).expand(shape)

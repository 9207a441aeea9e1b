"""Calls of every op that has a CUDA kernel, forward and backward."""

from __future__ import annotations

import torch
from tests.contract.every_op import OPS, operands_of, tensors_in
from torch import Tensor

import moe_ops
from moe_ops.self_test import has_kernel

# Larger sizes meet the kernels on TMA and wgmma, which need multiples of 8, in bf16.
DTYPES = (torch.bfloat16, torch.float32)
CASES = [
    (op, dtype)
    for op in OPS
    for dtype in DTYPES
    if has_kernel(op, "cuda") and not (op.endswith("_fp8") and dtype == torch.float32)
]
IDS = [f"{op}-{str(dtype).removeprefix('torch.')}" for op, dtype in CASES]


def copy_of(call: dict, device: torch.device | str) -> dict:
    return {n: v.to(device, copy=True) if isinstance(v, Tensor) else v for n, v in call.items()}


def call_of(op: str, dtype: torch.dtype, seed: int, device: torch.device | str = "cuda") -> dict:
    """Operands with the same values on every device."""
    with torch.device("cpu"):
        return copy_of(operands_of(op, dtype, seed), device)


class Step:
    """A call of an op and its backward. The gradients of the outputs are made at the first run, so
    that a later one is nothing but the op."""

    def __init__(self, op: str, backward: bool = True) -> None:
        self._op = getattr(moe_ops, op)
        self._backward = backward
        self._grads: list[Tensor] | None = None

    def __call__(self, call: dict) -> list[Tensor]:
        """The outputs, and the gradients by all floating-point operands."""
        if not self._backward:
            return tensors_in(self._op(**call))
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in call.items()
            if isinstance(value, Tensor) and value.dtype.is_floating_point
        }
        try:
            outputs = tensors_in(self._op(**{**call, **leaves}))
        except (RuntimeError, NotImplementedError):  # for inference only, and says so
            outputs = tensors_in(self._op(**call))
        through = [t for t in outputs if t.requires_grad]
        if not through:
            return outputs
        if self._grads is None:
            self._grads = [torch.ones_like(t) for t in through]
        found = torch.autograd.grad(through, list(leaves.values()), self._grads, allow_unused=True)
        return [*(t.detach() for t in outputs), *(t for t in found if t is not None)]


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)

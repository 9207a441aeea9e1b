"""What holds the registrations of the ops from Python, and those that are no rule of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Keeps the registrations alive for the life of the process.
library = torch.library.Library("moe_ops", "FRAGMENT")
# Ops whose CUDA kernel is made of torch's operations, and that kernel.
cuda_formulas: dict[str, Callable[..., Any]] = {}


def register_cuda_formula(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the CUDA kernel of an op that is best made of torch's operations there.

    Those are dense products, which cuBLAS multiplies, and formulas that a compiler fuses. The
    function gets the arguments of the schema, without trailing ones that equal their defaults, and
    runs below autograd: the op's own rule differentiates it.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        cuda_formulas[op] = kernel
        library.impl(op, kernel, "CUDA")
        return kernel

    return register


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the function that checks a call and gives outputs without values."""
    return torch.library.register_fake(f"moe_ops::{op}")

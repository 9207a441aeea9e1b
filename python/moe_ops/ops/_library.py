"""The library of Python registrations of the ops, and registrations other than autograd rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_ops._private_torch import arguments_of

# Keeps the registrations alive until the process ends.
library = torch.library.Library("moe_ops", "FRAGMENT")
# Op -> its CUDA kernel, if that is composed of torch operations.
cuda_formulas: dict[str, Callable[..., Any]] = {}
# Op -> its fake implementation; every op has one.
fakes: dict[str, Callable[..., Any]] = {}


class Signature:
    """Argument list of an op, with keyword-only arguments last."""

    def __init__(self, op: str) -> None:
        arguments = arguments_of(op)
        self.names = tuple(a.name for a in arguments)
        self.num_positional = sum(not a.kwarg_only for a in arguments)
        self.keywords = self.names[self.num_positional :]
        self.defaults = tuple(a.default_value for a in arguments)

    def complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Returns all arguments in order. The dispatcher drops trailing ones that equal their
        defaults."""
        given = (*args, *self.defaults[len(args) : self.num_positional])
        if not self.keywords:
            return given
        last = zip(self.keywords, self.defaults[self.num_positional :], strict=True)
        return *given, *(kwargs.get(name, default) for name, default in last)

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.keywords:
            return args, {}
        last = args[self.num_positional :]
        return args[: self.num_positional], dict(zip(self.keywords, last, strict=True))


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the fake implementation, which checks a call and returns outputs without values. It
    gets all arguments in the order of the schema, including defaults."""
    signature = Signature(op)

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return fake(*signature.complete(args, kwargs))

        torch.library.register_fake(f"moe_ops::{op}", run)
        fakes[op] = fake
        return fake

    return register


def register_cuda_formula(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the CUDA kernel of an op that is best composed of torch operations: of dense GEMMs,
    which cuBLAS runs, and of formulas that a compiler fuses.

    It gets all arguments in the order of the schema, after the op's fake has checked them, and runs
    below autograd: the op's own rule differentiates it.
    """
    signature, check = Signature(op), fakes[op]

    def register(formula: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            row = signature.complete(args, kwargs)
            check(*row)
            return formula(*row)

        cuda_formulas[op] = kernel
        library.impl(op, kernel, "CUDA")
        return formula

    return register

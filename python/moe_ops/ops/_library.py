"""What holds the registrations of the ops from Python, and those that are no rule of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Keeps the registrations alive for the life of the process.
library = torch.library.Library("moe_ops", "FRAGMENT")
# Ops whose only CUDA kernel is a sentence.
cpu_only_ops: list[str] = []


def register_cpu_only(name: str, instead: str) -> None:
    """An op without a CUDA kernel says so, and what to do instead."""
    cpu_only_ops.append(name)

    def refuse(*args: Any, **kwargs: Any) -> None:
        op = name.removesuffix("_fwd")
        raise NotImplementedError(f"{op}: it runs on the CPU only, got CUDA tensors; {instead}.")

    library.impl(name, refuse, "CUDA")


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the function that checks a call and gives outputs without values."""
    return torch.library.register_fake(f"moe_ops::{op}")

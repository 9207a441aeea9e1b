"""Conversion of torch's RuntimeErrors back to ValueErrors for invalid input.

From version 2.15, torch catches exceptions of kernels and raises a RuntimeError with their text,
which loses the exception type. A message about an argument begins with the op's name and states
what the argument must be; messages about device errors do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moe_ops._load import torch_version

LOST = torch_version() >= (2, 15)


def keep_kinds(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `call` so that its errors have the exception types of op `name` in C++."""

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeError as error:
            kind = _kind_of(name, error)
            if kind is None:
                raise
            raise kind(str(error)) from None

    return checked


def _kind_of(name: str, error: RuntimeError) -> type[Exception] | None:
    text = str(error)
    if type(error) is not RuntimeError:
        return None
    # grouped_gemm_fp8_wgrad_accumulate names grouped_gemm_fp8_wgrad, which is the public op.
    op, _, sentence = text.partition("\n")[0].partition(": ")
    if (name == op or name.startswith(f"{op}_")) and " must " in sentence:
        return ValueError
    return MemoryError if text.startswith("std::bad_alloc") else None

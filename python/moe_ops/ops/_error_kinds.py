"""Bad input stays a ValueError where torch makes a RuntimeError of it.

From version 2.15 on torch catches what a kernel throws and raises a RuntimeError with its text: the
kind is lost, the sentence is not. A sentence about an argument begins with the op and says what the
argument must be; that of a device's error does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moe_ops._load import torch_version

LOST = torch_version() >= (2, 15)


def keep_kinds(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose errors have the kinds that those of the op called `name` have in C++."""

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
    # grouped_gemm_fp8_wgrad_accumulate speaks of grouped_gemm_fp8_wgrad, which is what users call.
    op, _, sentence = text.partition("\n")[0].partition(": ")
    if (name == op or name.startswith(f"{op}_")) and " must " in sentence:
        return ValueError
    return MemoryError if text.startswith("std::bad_alloc") else None

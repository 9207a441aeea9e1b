"""Autocast rules of the ops, in Python because torch's stable ABI has none in C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops._private_torch import arguments_of, without_autocast
from moe_ops.ops._library import library


def register_autocast(op: str, cast: Sequence[str] = (), dtype: torch.dtype | None = None) -> None:
    """Registers an autocast rule that casts the named tensor arguments and no others.

    ``torch.library.register_autocast`` casts every floating tensor, so it would round fp32 routing
    weights to the autocast dtype. fp64 tensors (as in torch) and quantized values are never cast.

    Args:
        op: name of the op, without the namespace.
        cast: names of the arguments to cast; none for data movement and elementwise ops.
        dtype: target dtype; None is the autocast dtype of the device.
    """
    overload = getattr(torch.ops.moe_ops, op).default
    arguments = arguments_of(op)
    positional = [a.name for a in arguments if not a.kwarg_only]
    assert {a.name for a in arguments} >= set(cast), (op, cast)

    for device_type in ("cpu", "cuda"):
        below = without_autocast(device_type)

        def kernel(
            *args: Any, _below: Any = below, _device: str = device_type, **kwargs: Any
        ) -> Any:
            target = dtype or torch.get_autocast_dtype(_device)

            def convert(name: str, value: Any) -> Any:
                if (
                    name in cast
                    and isinstance(value, Tensor)
                    and value.is_floating_point()
                    and value.dtype != torch.float64
                    and value.itemsize > 1  # float8 tensors are quantized values.
                    and value.device.type == _device
                ):
                    return value.to(target)
                return value

            new_args = [convert(n, v) for n, v in zip(positional, args, strict=False)]
            new_kwargs = {n: convert(n, v) for n, v in kwargs.items()}
            with _below():
                return overload(*new_args, **new_kwargs)

        library.impl(op, kernel, f"Autocast{device_type.upper()}")

"""Activations of feed-forward networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.formulas.dtypes import accumulate_dtype

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _relu2(t: Tensor) -> Tensor:
    return F.relu(t).square()


# Activations without a gate.
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}
# Functions of the gate by gated activation; the result is multiplied by the up half.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": _gelu_tanh,
    "reglu": F.relu,
}


def plain_act(preact: Tensor, activation: str) -> Tensor:
    """Applies an activation without a gate, in float32 (float64 for float64).

    Raises:
        ValueError: an unknown activation.
    """
    if activation not in PLAIN:
        raise ValueError(f"activation must be one of {', '.join(PLAIN)}, got {activation!r}.")
    return PLAIN[activation](preact.to(accumulate_dtype(preact.dtype))).to(preact.dtype)


def plain_act_gradient(grad: Tensor, preact: Tensor, activation: str) -> Tensor:
    """Returns the gradient of `preact`; names that are not in `PLAIN` are the identity."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, preact)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, preact)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, preact, approximate="tanh")
    if activation == "relu":
        return torch.where(preact > 0, grad, 0)
    if activation == "relu2":
        return grad * 2 * preact.clamp(min=0)
    return grad

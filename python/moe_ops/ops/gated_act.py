"""gated_act: the gated activation of expert FFNs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_ops.ops._autocast import register_autocast
from moe_ops.ops._autograd import direct_call, register_autograd, register_no_double_backward
from moe_ops.ops._checks import (
    check,
    check_choice,
    check_dtype,
    check_float,
    check_same_device,
    new_like,
)
from moe_ops.ops._library import register_fake

_gated_act = direct_call("gated_act")

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "swiglu_clamped")
PLAIN_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def gated_act(
    gate_up: Tensor,
    activation: str = "swiglu",
    *,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Computes the activation of the gate times up.

    With g the gate and u the up half:

    - ``"swiglu"``: ``g * sigmoid(g) * u``
    - ``"geglu"``: ``gelu(g) * u`` with the error function; ``"geglu_tanh"`` with its tanh form
    - ``"reglu"``: ``max(g, 0) * u``
    - ``"swiglu_oai"`` (gpt-oss): ``(clamp(u, -limit, limit) + 1) * g' * sigmoid(alpha * g')`` with
      ``g' = min(g, limit)``
    - ``"swiglu_clamped"`` (DeepSeek-V4): ``clamp(u, -limit, limit) * g' * sigmoid(g')``

    Args:
        gate_up: [..., 2I]; float64, float32, bfloat16 or float16, any strides. Gate half first, or
            gate in the even and up in the odd columns when ``interleaved``.
        activation: one of the names above.
        interleaved: layout of the last dimension.
        alpha: parameter of ``"swiglu_oai"``.
        limit: parameter of ``"swiglu_oai"`` and ``"swiglu_clamped"``; positive.

    Returns:
        [..., I] in the dtype of gate_up, computed in fp32 (fp64 for fp64).

    Raises:
        ValueError: wrong dtype, odd last dimension, unknown activation.

    Source:
        Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    return _gated_act(gate_up, activation, interleaved=interleaved, alpha=alpha, limit=limit)


def check_activation(
    op: str, activation: str, alpha: float, limit: float, gated_only: bool
) -> None:
    names = GATED_ACTIVATIONS if gated_only else GATED_ACTIVATIONS + PLAIN_ACTIVATIONS
    check_choice(op, "activation", activation, names)
    check(math.isfinite(alpha), f"{op}: alpha must be finite, got {alpha}.")
    check(limit > 0, f"{op}: limit must be positive, got {limit}.")


@register_fake("gated_act")
def _(gate_up: Tensor, activation: str, interleaved: bool, alpha: float, limit: float) -> Tensor:
    op = "gated_act"
    check_float(op, "gate_up", gate_up)
    check_activation(op, activation, alpha, limit, True)
    check(gate_up.dim() >= 1, f"{op}: gate_up must be [..., 2I], got shape {list(gate_up.shape)}.")
    check(
        gate_up.shape[-1] % 2 == 0,
        f"{op}: gate_up must have an even last dimension (gate and up), "
        f"got shape {list(gate_up.shape)}.",
    )
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@register_fake("gated_act_bwd")
def _(
    grad_h: Tensor, gate_up: Tensor, activation: str, interleaved: bool, alpha: float, limit: float
) -> Tensor:
    op = "gated_act_bwd"
    check_float(op, "gate_up", gate_up)
    check_dtype(op, "grad_h", grad_h.dtype, (gate_up.dtype,), " like gate_up")
    check_activation(op, activation, alpha, limit, True)
    check_same_device(op, gate_up=gate_up, grad_h=grad_h)
    return new_like(gate_up)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, *ctx.arguments = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (gate_up,) = ctx.saved_tensors
    return torch.ops.moe_ops.gated_act_bwd(grad, gate_up, *ctx.arguments), *(None,) * 4


register_autograd("gated_act", _backward, _setup)
register_no_double_backward("gated_act_bwd")
register_autocast("gated_act")

"""The router's linear map: logits = x W^T + b.

Letters: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.numerics import is_batch_invariant
from moe_ops.ops import router_linear

from ..invariant import linear


def router_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> Tensor:
    """[T, E] of x [T, H] and weight [E, H], computed in `logits_dtype` also under autocast; None:
    in the type of the operands, or that of autocast."""
    if use_router_linear(x, weight, logits_dtype):
        x, weight, bias = router_linear_operands(x, weight, bias, logits_dtype)
        return router_linear(x, weight, bias, logits_dtype=logits_dtype)
    device_type = x.device.type
    autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    if logits_dtype is None:
        return linear(x if autocast else x.to(weight.dtype), weight, bias)
    x, weight = x.to(logits_dtype), weight.to(logits_dtype)
    bias = None if bias is None else bias.to(logits_dtype)
    if not autocast:
        return linear(x, weight, bias)
    with torch.autocast(device_type, enabled=False):
        return linear(x, weight, bias)


def use_router_linear(x: Tensor, weight: Tensor, logits_dtype: torch.dtype | None) -> bool:
    """Whether the op `router_linear` is faster than `linear`; compiled code keeps the latter."""
    e, h = weight.shape
    return (
        e <= 8
        and (e <= 4 or (h >= 256 and weight.element_size() == 2))
        and not torch.compiler.is_compiling()
        and x.device.type == weight.device.type == "cpu"
        and x.dim() == 2
        # A smaller F.linear is done before Python has called the op.
        and x.numel() >= 2**15
        and logits_dtype in (None, torch.float32, weight.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not is_batch_invariant()
    )


def router_linear_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias in types that `router_linear` takes. Half x and weights stay as they are:
    the op makes float32 logits of them."""
    if logits_dtype is not None and (x.dtype != weight.dtype or weight.dtype == torch.float64):
        weight = weight.to(logits_dtype)
        bias = None if bias is None else bias.to(logits_dtype)
    return x.to(weight.dtype), weight, bias

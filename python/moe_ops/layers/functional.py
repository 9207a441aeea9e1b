"""What layers compute beside experts: torch's functions, or ops in their place.

In the batch-invariant mode these are ops, because torch's products choose by the number of rows,
and on the CPU its activations treat the last elements of a thread's share otherwise than the rest.
Small routers have an op that is faster than torch's product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops import gated_act, grouped_gemm, mix_expert_outputs, router_linear

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


def multiplies_by_ops(x: Tensor) -> bool:
    """Whether ops take the place of torch's products on x."""
    return is_batch_invariant_enabled() and x.device.type in ("cpu", "cuda")


def _acts_by_ops(x: Tensor) -> bool:
    """Whether ops take the place of torch's activations on x. On CUDA an element's is the same
    wherever it stands."""
    return is_batch_invariant_enabled() and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    if not multiplies_by_ops(x):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    offsets = torch.arange(2, device=x.device) * rows.shape[0]
    y = grouped_gemm(rows, weight[None], offsets, bias=None if bias is None else bias[None])
    return y.view(*x.shape[:-1], weight.shape[0])


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), where module is an `nn.Linear` or what its owner put in its place."""
    if multiplies_by_ops(x) and type(module) is nn.Linear:
        return linear(x, module.weight, module.bias)
    y: Tensor = module(x)
    return y


def plain_activation(x: Tensor, activation: str) -> Tensor:
    """relu, relu2, silu, gelu or gelu_tanh."""
    if activation in ("relu", "relu2"):
        h = F.relu(x)
        return h * h if activation == "relu2" else h
    if _acts_by_ops(x):
        return gated_act(torch.cat([x, torch.ones_like(x)], -1), _GATED[activation])
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def sigmoid(x: Tensor) -> Tensor:
    """`torch.sigmoid` of [T, 1]."""
    if not _acts_by_ops(x):
        return x.sigmoid()
    return mix_expert_outputs(x[:, None], torch.ones_like(x)[:, None], activation="sigmoid")[0][
        :, 0
    ]


def router_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> Tensor:
    """A router's x W^T + b, [T, E], of x [T, H] and weight [E, H], computed in `logits_dtype` also
    under autocast; None: in the type of the operands, or that of autocast."""
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
        and not is_batch_invariant_enabled()
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

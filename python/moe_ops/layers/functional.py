"""Linear maps, activations and router logits of layers, computed by torch or by ops.

Batch-invariant mode uses ops, because torch selects GEMMs by the number of rows, and its CPU
activations treat the last elements of a thread's share differently. For small routers, an op is
faster than torch's GEMM.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops import gated_act, grouped_gemm, mix_expert_outputs, router_linear

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


def multiplies_by_ops(x: Tensor) -> bool:
    """Returns whether ops replace torch's GEMMs on x."""
    return is_batch_invariant_enabled() and x.device.type in ("cpu", "cuda")


def _acts_by_ops(x: Tensor) -> bool:
    """Returns whether ops replace torch's activations on x. On CUDA, an element's result does not
    depend on its position."""
    return is_batch_invariant_enabled() and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `F.linear`."""
    if not multiplies_by_ops(x):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    offsets = torch.arange(2, device=x.device) * rows.shape[0]
    y = grouped_gemm(rows, weight[None], offsets, bias=None if bias is None else bias[None])
    return y.view(*x.shape[:-1], weight.shape[0])


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Returns module(x), where module is an `nn.Linear` or a replacement."""
    if multiplies_by_ops(x) and type(module) is nn.Linear:
        return linear(x, module.weight, module.bias)
    y: Tensor = module(x)
    return y


def plain_activation(x: Tensor, activation: str) -> Tensor:
    """Computes relu, relu2, silu, gelu or gelu_tanh."""
    if activation in ("relu", "relu2"):
        h = F.relu(x)
        return h * h if activation == "relu2" else h
    if _acts_by_ops(x):
        return gated_act(torch.cat([x, torch.ones_like(x)], -1), _GATED[activation])
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def sigmoid(x: Tensor) -> Tensor:
    """Computes `torch.sigmoid` of [T, 1]."""
    if not _acts_by_ops(x):
        return x.sigmoid()
    return mix_expert_outputs(x[:, None], torch.ones_like(x)[:, None], activation="sigmoid")[0][
        :, 0
    ]


def router_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> Tensor:
    """Computes a router's logits x W^T + b, [T, E], from x [T, H] and weight [E, H], in
    `logits_dtype` also under autocast; None: in the dtype of the operands, or of autocast."""
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
    """Returns whether the op `router_linear` is faster than `linear`; compiled code uses
    `linear`."""
    e, h = weight.shape
    return (
        e <= 8
        and (e <= 4 or (h >= 256 and weight.element_size() == 2))
        and not torch.compiler.is_compiling()
        and x.device.type == weight.device.type == "cpu"
        and x.dim() == 2
        # A smaller F.linear takes less time than the op's Python call.
        and x.numel() >= 2**15
        and logits_dtype in (None, torch.float32, weight.dtype)
        and not torch.is_autocast_enabled("cpu")
        and not is_batch_invariant_enabled()
    )


def router_linear_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Converts x, weight and bias to dtypes that `router_linear` supports. Half-precision x and
    weights are unchanged; the op computes float32 logits from them."""
    if logits_dtype is not None and (x.dtype != weight.dtype or weight.dtype == torch.float64):
        weight = weight.to(logits_dtype)
        bias = None if bias is None else bias.to(logits_dtype)
    return x.to(weight.dtype), weight, bias

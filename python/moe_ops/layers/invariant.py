"""What layers compute outside the ops of this package: torch's functions, and in the
batch-invariant mode ops in their place. Torch's products choose by the number of rows, and its
activations treat the last elements of a thread's share otherwise than the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.numerics import is_batch_invariant
from moe_ops.ops import gated_act, grouped_gemm, mix_experts

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


def uses_ops(x: Tensor) -> bool:
    """Whether ops take the place of torch's functions on x."""
    return is_batch_invariant() and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    if not uses_ops(x):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    offsets = torch.tensor([0, rows.shape[0]], dtype=torch.int64)
    y = grouped_gemm(rows, weight[None], offsets, bias=None if bias is None else bias[None])
    return y.view(*x.shape[:-1], weight.shape[0])


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), where module is an `nn.Linear` or what its owner put in its place."""
    if uses_ops(x) and type(module) is nn.Linear:
        return linear(x, module.weight, module.bias)
    y: Tensor = module(x)
    return y


def plain_activation(x: Tensor, activation: str) -> Tensor:
    """relu, relu2, silu, gelu or gelu_tanh."""
    if activation in ("relu", "relu2"):
        h = F.relu(x)
        return h * h if activation == "relu2" else h
    if uses_ops(x):
        return gated_act(torch.cat([x, torch.ones_like(x)], -1), _GATED[activation])
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def sigmoid(x: Tensor) -> Tensor:
    """`torch.sigmoid` of [T, 1]."""
    if not uses_ops(x):
        return x.sigmoid()
    return mix_experts(x[:, None], torch.ones_like(x)[:, None], activation="sigmoid")[0][:, 0]

"""Copies of modules that are run once with numbers of their own, to see what they compute."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def shell(module: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    """The module in eval mode, without hooks and with other parts."""
    probe = type(module).__new__(type(module))
    probe.__dict__.update(module.__dict__)
    probe.__dict__.update({k: type(v)() for k, v in module.__dict__.items() if k.endswith("hooks")})
    probe.__dict__.update(_modules=dict(parts), training=False)
    return probe


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def random_copy(module: nn.Module) -> Any:
    """The module and all in it, in fp32 on the CPU, with parameters of its own. Rows of matrices
    overlap, so that they take no memory worth mentioning."""
    generator = torch.Generator().manual_seed(1)

    def random(p: Tensor) -> nn.Parameter:
        if p.dim() == 1:
            values = 1.0 + 0.5 * torch.randn(p.shape, generator=generator)
        else:
            rows, size = math.prod(p.shape[:-1]), p.shape[-1]
            line = torch.randn(3 * rows + size, generator=generator) * size**-0.5
            values = line.as_strided((rows, size), (3, 1))
        return nn.Parameter(values, requires_grad=False)

    parts = {name: random_copy(m) for name, m in module._modules.items() if m is not None}
    probe = shell(module, parts)
    parameters = {k: None if p is None else random(p) for k, p in module._parameters.items()}
    probe.__dict__["_parameters"] = parameters
    return probe

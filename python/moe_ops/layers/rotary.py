"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), halves rotated as in Llama.

Letters: B batch, S tokens of a sequence, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotation(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., size / 2] fp32 of the angles of positions [...]; size is even."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions[..., None].float() * theta**-steps
    return angles.cos(), angles.sin()


def rotate_halves(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """t [B, S, ..., d] with features i and i + d / 2 turned as a pair.

    Args:
        cos, sin: [S, d / 2] or [B, S, d / 2], constants.
    """
    shape = cos.shape[:-1] + (1,) * (t.dim() - 3) + cos.shape[-1:]
    cos, sin = cos.view(shape).to(t.dtype), sin.view(shape).to(t.dtype)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        a, b = t.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return _Rotate.apply(t, cos, sin)


class _Rotate(torch.autograd.Function):
    """Four passes over halves, forward and backward. The formula as it stands is seven passes, and
    eighteen in backward: gradients of halves are first widened by zeros and then added."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        a, b = t.chunk(2, dim=-1)
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
        first, second = out.chunk(2, dim=-1)
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=second).addcmul_(a, sin)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None

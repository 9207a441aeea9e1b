"""The angles of rotary position embeddings (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., size / 2] fp32 of the angles of positions [...]; size is even."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions[..., None].float() * theta**-steps
    return angles.cos(), angles.sin()

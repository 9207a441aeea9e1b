"""Rotary position embeddings: frequencies, angles of positions, rotation of features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """Extension of RoPE to a longer context (YaRN, Peng et al. 2023, arXiv 2309.00071).

    Attributes:
        factor: ratio of the new context to the old.
        original_context: tokens of the old context.
        beta_fast, beta_slow: rotations within the old context above which a frequency is kept, and
            below which it is divided by `factor`; between them the two are blended.
        mscale, mscale_all_dim: cos and sin are multiplied by magnitude(mscale) /
            magnitude(mscale_all_dim), and the softmax scale by magnitude(mscale_all_dim)^2
            (DeepSeek-V2). If either is 0, cos and sin are multiplied by magnitude(1).
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def rotation_scale(self) -> float:
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    def softmax_factor(self) -> float:
        return self.magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


class Rotation(NamedTuple):
    """Cosines and sines of the angles of positions [...], each [..., d / 2] fp32."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings of d features (Su et al. 2021, arXiv 2104.09864).

    Attributes:
        size: d, the even number of rotated features.
        theta: base of the frequencies theta ** (-2 i / d).
        interleaved: if True, pairs are features (2 i, 2 i + 1), as in DeepSeek-V2 and V3, instead
            of (i, i + d / 2).
        yarn: context extension, or None.
    """

    size: int
    theta: float = 10_000.0
    interleaved: bool = False
    yarn: Yarn | None = None

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Returns the frequencies, [d / 2] fp32, in radians per position."""
        steps = torch.arange(0, self.size, 2, dtype=torch.float32, device=device) / self.size
        plain = 1.0 / self.theta**steps
        if self.yarn is None:
            return plain

        def feature_with(turns: float) -> float:
            # Feature with this number of rotations within the old context.
            yarn = self.yarn
            assert yarn is not None
            span = yarn.original_context / (turns * 2 * math.pi)
            return self.size * math.log(span) / (2 * math.log(self.theta))

        low = max(math.floor(feature_with(self.yarn.beta_fast)), 0)
        high = min(math.ceil(feature_with(self.yarn.beta_slow)), self.size - 1)
        index = torch.arange(self.size // 2, dtype=torch.float32, device=device)
        # If both ends are equal, the ramp is a step; 0.001 only avoids 0 / 0.
        stretched = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain * (1 - stretched) + plain / self.yarn.factor * stretched

    def at(self, positions: Tensor) -> Rotation:
        """Returns the rotation of positions [...], in any dtype."""
        angles = positions[..., None].float() * self.frequencies(positions.device)
        if self.yarn is None:
            return Rotation(angles.cos(), angles.sin())
        scale = self.yarn.rotation_scale()
        return Rotation(angles.cos() * scale, angles.sin() * scale)

    def rotation(self, start: int, length: int, device: torch.device | None = None) -> Rotation:
        """Returns the rotation of the positions start .. start + length - 1."""
        return self.at(torch.arange(start, start + length, dtype=torch.float32, device=device))

    def rotate(self, t: Tensor, rotation: Rotation) -> Tensor:
        """Rotates t [B, S, n, d] in its own dtype, like the published models (`moe_ops.rotary`
        computes in fp32). With `interleaved`, the result contains the first features of all pairs
        before the second ones, in queries and keys, which does not change their dot products."""
        cos, sin = (f[:, None].to(t.dtype) for f in rotation)
        if self.interleaved:
            a, b = t[..., 0::2], t[..., 1::2]
        else:
            a, b = t.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

"""Images that are generated: warped digits in noise. Letters: B images, S pixels of a side."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Seven rows of five dots for each digit, a row a number from its dots as bits.
_DIGITS = (
    (14, 17, 19, 21, 25, 17, 14),
    (4, 12, 4, 4, 4, 4, 14),
    (14, 17, 1, 6, 8, 16, 31),
    (30, 1, 1, 14, 1, 1, 30),
    (2, 6, 10, 18, 31, 2, 2),
    (31, 16, 30, 1, 1, 17, 14),
    (6, 8, 16, 30, 17, 17, 14),
    (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14),
    (14, 17, 17, 15, 1, 2, 12),
)


def glyphs() -> Tensor:
    """[10, 1, 7, 5] of 0 and 1."""
    rows = torch.tensor(_DIGITS)[:, None, :, None]
    return (rows >> torch.arange(4, -1, -1) & 1).float()


def warped_digits(
    count: int, size: int, generator: torch.Generator, *, noise: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Digits turned by up to 20 degrees, sheared, scaled and moved, with a random contrast.

    Args:
        count, size: B and S.
        noise: deviation of what is added to every pixel.

    Returns:
        Images [B, 1, S, S] and labels [B] in [0, 10), on the generator's device.
    """

    how: Any = {"generator": generator, "device": generator.device}

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, **how)

    labels = torch.randint(10, (count,), **how)
    turn, shear = between(-0.35, 0.35), between(-0.25, 0.25)
    # From a place in the image to one in the glyph: the inverse of what is done to the glyph.
    across, down = 1 / between(0.5, 0.8), 1 / between(0.65, 0.95)
    cos, sin = turn.cos(), turn.sin()
    top = torch.stack([across * (cos + shear * sin), across * (sin - shear * cos)], -1)
    bottom = torch.stack([-down * sin, down * cos], -1)
    matrix = torch.stack([top, bottom], 1)
    middle = torch.stack([between(-0.25, 0.25), between(-0.2, 0.2)], -1)
    shift = -(matrix @ middle[:, :, None])
    grid = F.affine_grid(
        torch.cat([matrix, shift], -1), [count, 1, size, size], align_corners=False
    )
    images = F.grid_sample(glyphs().to(grid)[labels], grid, align_corners=False)
    images = images * between(0.5, 1.5)[:, None, None, None]
    return images + noise * torch.randn(images.shape, **how), labels

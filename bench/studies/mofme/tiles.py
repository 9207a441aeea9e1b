"""Restoring an image of any size, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.zoo.mofme import RestorationTransformer


@torch.no_grad()
def restore(model: RestorationTransformer, image: Tensor, tile: int, overlap: int = 0) -> Tensor:
    """An image of any size, [3, h, w], tile by tile; where tiles overlap, their mean.

    Args:
        tile: side of the tiles, a multiple of the patch and not larger than the image: that of the
            crops in training is best. overlap: pixels that neighboring tiles share at least, less
            than `tile`.
    """
    if not 0 <= overlap < tile or tile > min(image.shape[1:]):
        raise ValueError(
            f"restore: tile must be in (overlap, {min(image.shape[1:])}], got {tile} with "
            f"overlap {overlap}."
        )
    before = model.training
    model.eval()
    total, count = torch.zeros_like(image), torch.zeros_like(image[:1])
    for top in starts(image.shape[1], tile, overlap):
        lefts = starts(image.shape[2], tile, overlap)
        row = torch.stack([image[:, top : top + tile, x : x + tile] for x in lefts])
        for x, made in zip(lefts, model(row)[0], strict=True):
            total[:, top : top + tile, x : x + tile] += made
            count[:, top : top + tile, x : x + tile] += 1
    model.train(before)
    return total / count


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Returns the starts of tiles that cover a length; the last tile ends with it."""
    last = length - tile
    return [*range(0, last, tile - overlap), last]

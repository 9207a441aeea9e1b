"""Pinhole cameras: rays through pixels, and projection of points to pixels.

Axes of a camera: x to the right, y down, z forward. Pixel (0, 0) is the center of the first pixel
of the first row. Letters: ... leading dimensions, V views, R rays, P points of a ray, h and w
height and width of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Cameras(NamedTuple):
    """Cameras. position: [..., 3]. rotation: [..., 3, 3], whose columns are the camera's axes in
    space. focal: [...], in pixels. height, width: of all images."""

    position: Tensor
    rotation: Tensor
    focal: Tensor
    height: int
    width: int


def rays(cameras: Cameras, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns origins and unit directions, [..., R, 3] each, of the rays through pixels [..., R,
    2]."""
    middle = pixels.new_tensor([cameras.width - 1, cameras.height - 1]) / 2
    offset = (pixels - middle) / cameras.focal[..., None, None]
    local = torch.cat([offset, torch.ones_like(offset[..., :1])], -1)
    directions = F.normalize(local @ cameras.rotation.transpose(-1, -2), dim=-1)
    return cameras.position[..., None, :].expand_as(directions), directions


def project(cameras: Cameras, points: Tensor) -> tuple[Tensor, Tensor]:
    """Returns pixels [..., N, 2] at which cameras [...] see points [..., N, 3], and bool [..., N],
    True if they are inside the image and in front of the camera."""
    local = (points - cameras.position[..., None, :]) @ cameras.rotation
    depth = local[..., 2:]
    pixels = cameras.focal[..., None, None] * local[..., :2] / depth.clamp(min=1e-6)
    size = points.new_tensor([cameras.width - 1, cameras.height - 1])
    # Clamping far outside changes nothing and keeps infinite values, which give NaN gradients, out.
    pixels = (pixels + size / 2).clamp(-1e4, 1e4)
    inside = ((pixels >= 0) & (pixels <= size)).all(-1)
    return pixels, inside & (depth[..., 0] > 0)


def sample_images(images: Tensor, pixels: Tensor, height: int, width: int) -> Tensor:
    """Samples images [B, C, h', w'] at pixels [B, N, 2] bilinearly, [B, N, C]; the border value is
    used outside.

    height, width: image size in pixel coordinates; images of other sizes are scaled to it.
    """
    size = pixels.new_tensor([width - 1, height - 1])
    grid = (2 * pixels / size - 1)[:, None]
    found = F.grid_sample(images, grid, padding_mode="border", align_corners=True)
    return found[:, :, 0].transpose(1, 2)


def ray_differences(points: Tensor, target: Tensor, sources: Tensor) -> Tensor:
    """Returns the difference of the directions from points [..., N, 3] to a target camera at [...,
    3] and to source cameras at [..., V, 3], as [..., N, V, 4]: the direction of the difference of
    the two unit vectors, and their inner product."""
    to_target = F.normalize(target[..., None, :] - points, dim=-1)[..., None, :]
    to_source = F.normalize(sources[..., None, :, :] - points[..., None, :], dim=-1)
    difference = to_target - to_source
    inner = (to_target * to_source).sum(-1, keepdim=True)
    return torch.cat([F.normalize(difference, dim=-1, eps=1e-6), inner], -1)

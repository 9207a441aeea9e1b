"""Scenes of spheres and boxes on a floor, and rendering of camera images.

Colors depend on the first point that a ray hits: there are no shadows and no reflections of other
objects. Letters: S scenes, O objects of a scene, R rays, V views.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.zoo.gntmove.cameras import Cameras, rays

MATERIALS = ("diffuse", "glossy", "textured")
FAR = 1e4
AMBIENT, SHINE, GLOSS = 0.4, 24.0, 0.8


class Scenes(NamedTuple):
    """S scenes of O objects each and a floor, y = 0.

    centers: [S, O, 3]. sizes: [S, O, 3], half the sides of a box; the first is the radius of a
    sphere. spheres: [S, O] bool, False: a box along the axes. colors: [S, O + 1, 3], the floor's
    last. waves: [S, O + 1, 3], of textures, 0 for no texture. glossy: [S] bool. light: [S, 3],
    unit, towards the light. sky: [S, 3]. material: [S], indices of names in `MATERIALS`.
    """

    centers: Tensor
    sizes: Tensor
    spheres: Tensor
    colors: Tensor
    waves: Tensor
    glossy: Tensor
    light: Tensor
    sky: Tensor
    material: Tensor


class Hits(NamedTuple):
    """First hits of rays [S, R]: depth [S, R] (`FAR` if nothing is hit), normal [S, R, 3], thing
    [S, R]: object index, O for the floor, O + 1 for nothing."""

    depth: Tensor
    normal: Tensor
    thing: Tensor


def draw_scenes(
    count: int,
    generator: torch.Generator,
    *,
    things: int = 3,
    material: int | None = None,
) -> Scenes:
    """Draws random scenes; their materials are drawn too if none is given."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    if material is None:
        kind = torch.randint(len(MATERIALS), (count,), generator=generator)
    else:
        kind = torch.full((count,), material)
    spheres = torch.rand(count, things, generator=generator) < 0.5
    sizes = uniform(0.25, 0.55, things, 3)
    sizes = torch.where(spheres[..., None], sizes[..., :1], sizes)
    # Around the middle, each in its own sector.
    sector = torch.arange(things) * (2 * math.pi / things)
    angle = sector + uniform(0, 2 * math.pi, 1) + uniform(-0.4, 0.4, things)
    away = uniform(0.4, 0.8, things)
    x, z = away * angle.cos(), away * angle.sin()
    centers = torch.stack([x, sizes[..., 1], z], -1)
    waves = uniform(3.0, 8.0, things + 1, 3) * (kind == MATERIALS.index("textured"))[:, None, None]
    height = uniform(math.pi / 5, math.pi / 2.5)
    turn = uniform(0, 2 * math.pi)
    light = torch.stack([height.cos() * turn.cos(), height.sin(), height.cos() * turn.sin()], -1)
    return Scenes(
        centers, sizes, spheres, uniform(0.15, 0.95, things + 1, 3), waves,
        kind == MATERIALS.index("glossy"), light, uniform(0.6, 1.0, 3), kind,
    )  # fmt: skip


def trace(scenes: Scenes, origins: Tensor, directions: Tensor) -> Hits:
    """Returns the first hits of rays [S, R, 3] with unit directions."""
    o, d = origins[:, :, None], directions[:, :, None]
    centers, sizes = scenes.centers[:, None], scenes.sizes[:, None]
    # Spheres: |o + t d - c|^2 = r^2.
    away = o - centers
    half = (away * d).sum(-1)
    inside = half.square() - away.square().sum(-1) + sizes[..., 0].square()
    ball = torch.where(inside > 0, -half - inside.clamp(min=0).sqrt(), FAR)
    # Boxes: between the last entry and the first exit of three pairs of planes.
    slope = torch.where(d.abs() < 1e-9, 1e-9, d)
    first = (-away - sizes * slope.sign()) / slope
    last = (-away + sizes * slope.sign()) / slope
    enter, axis = first.max(-1)
    box = torch.where(enter < last.amin(-1), enter, FAR)
    depth = torch.where(scenes.spheres[:, None], ball, box)
    depth = torch.where(depth > 1e-4, depth, FAR)
    floor = torch.where(directions[..., 1] < -1e-6, -origins[..., 1] / directions[..., 1], FAR)
    depth = torch.cat([depth, floor.clamp(max=FAR)[..., None]], -1)
    depth, thing = depth.min(-1)
    none = depth >= FAR
    points = origins + depth[..., None] * directions
    count = scenes.centers.shape[1]
    at = thing.clamp(max=count - 1)[..., None]
    index = at.expand(*at.shape[:2], 3)
    round_normal = F.normalize(points - scenes.centers.gather(1, index), dim=-1)
    side = axis.gather(2, at)
    flat_normal = F.one_hot(side[..., 0], 3) * -directions.gather(2, side).sign()
    is_ball = scenes.spheres.gather(1, at[..., 0])[..., None]
    normal = torch.where(is_ball, round_normal, flat_normal.to(points.dtype))
    up = points.new_tensor([0.0, 1.0, 0.0])
    normal = torch.where((thing == count)[..., None], up, normal)
    return Hits(depth.clamp(max=FAR), normal, torch.where(none, count + 1, thing))


def shade(scenes: Scenes, hits: Hits, origins: Tensor, directions: Tensor) -> Tensor:
    """Returns colors [S, R, 3] in [0, 1] of the hits: Lambert's law, Blinn-Phong highlights on
    glossy objects, waves on textured ones, and the sky."""
    count = scenes.centers.shape[1]
    at = hits.thing.clamp(max=count)[..., None].expand(*hits.thing.shape, 3)
    color, waves = scenes.colors.gather(1, at), scenes.waves.gather(1, at)
    points = origins + hits.depth.clamp(max=100.0)[..., None] * directions
    pattern = (waves * points).sin().mean(-1, keepdim=True)
    textured = (scenes.material == MATERIALS.index("textured"))[:, None, None]
    color = torch.where(textured, color * (0.6 + 0.6 * pattern), color)
    light = scenes.light[:, None]
    lit = (hits.normal * light).sum(-1, keepdim=True).clamp(min=0)
    color = color * (AMBIENT + (1 - AMBIENT) * lit)
    halfway = F.normalize(light - directions, dim=-1)
    shine = (hits.normal * halfway).sum(-1, keepdim=True).clamp(min=0) ** SHINE
    color = color + GLOSS * shine * (scenes.glossy[:, None, None] & (lit > 0))
    nothing = (hits.thing == count + 1)[..., None]
    return torch.where(nothing, scenes.sky[:, None], color).clamp(0, 1)


def see(scenes: Scenes, origins: Tensor, directions: Tensor) -> Tensor:
    """Returns colors [S, R, 3] of rays [S, R, 3]."""
    return shade(scenes, trace(scenes, origins, directions), origins, directions)


def photograph(scenes: Scenes, cameras: Cameras) -> Tensor:
    """Renders images [S, V, 3, h, w] of S scenes for their cameras [S, V]."""
    count, views = cameras.focal.shape
    height, width = cameras.height, cameras.width
    pixels = all_pixels(height, width).expand(count, views, -1, 2)
    origins, directions = rays(cameras, pixels)
    colors = see(scenes, origins.flatten(1, 2), directions.flatten(1, 2))
    return colors.view(count, views, height, width, 3).permute(0, 1, 4, 2, 3)


def draw_cameras(
    count: int, views: int, size: int, generator: torch.Generator, *, spread: float = 0.5
) -> tuple[Cameras, Cameras]:
    """Draws target cameras [S], and source cameras [S, V] around each, at most `spread` radians
    to the sides and half of that up or down. All look at the middle of the scene; images are
    square."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    turn, rise = uniform(0, 2 * math.pi, 1), uniform(0.35, 0.75, 1)
    turns = torch.cat([turn, turn + uniform(-spread, spread, views)], 1)
    rises = torch.cat([rise, (rise + uniform(-spread / 2, spread / 2, views)).clamp(0.2, 1.0)], 1)
    away = uniform(3.4, 4.2, views + 1)
    x, z = rises.cos() * turns.cos(), rises.cos() * turns.sin()
    middle = torch.tensor([0.0, 0.35, 0.0])
    position = middle + away[..., None] * torch.stack([x, rises.sin(), z], -1)
    focal = torch.full((count, views + 1), 1.2 * size)
    every = look_at(position, middle.expand_as(position), focal, size, size)
    return at(every, (slice(None), 0)), at(every, (slice(None), slice(1, None)))


def at(cameras: Cameras, index: Any) -> Cameras:
    """Returns the cameras at an index into the leading dimensions."""
    parts = (cameras.position[index], cameras.rotation[index], cameras.focal[index])
    return Cameras(*parts, cameras.height, cameras.width)


def look_at(position: Tensor, target: Tensor, focal: Tensor, height: int, width: int) -> Cameras:
    """Returns cameras at position [..., 3] centered on target [..., 3], upright: the y axis of
    space is up. focal: [...]."""
    forward = F.normalize(target - position, dim=-1)
    up = position.new_tensor([0.0, 1.0, 0.0]).expand_as(forward)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    return Cameras(position, torch.stack([right, down, forward], -1), focal, height, width)


def all_pixels(height: int, width: int) -> Tensor:
    """Returns [h * w, 2], x and y of each pixel, row by row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2).float()

"""Cameras, by cases that are known."""

from __future__ import annotations

import math

import torch
from bench.studies.gntmove.scenes import (
    all_pixels,
    at,
    draw_cameras,
    look_at,
)

from moe_ops.zoo.gntmove.cameras import project, ray_differences, rays, sample_images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_points_on_a_ray_are_seen_at_its_pixel():
    target, sources = draw_cameras(2, 3, 16, generator())
    pixels = all_pixels(16, 16).expand(2, 3, -1, 2)
    origins, directions = rays(sources, pixels)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2, 3, 256))
    where, inside = project(sources, origins + 2.5 * directions)
    torch.testing.assert_close(where, pixels, atol=1e-3, rtol=0)
    # The border itself is in the image up to rounding.
    inner = ((pixels > 0) & (pixels < 15)).all(-1)
    assert bool(inside[inner].all())
    behind = project(sources, origins - directions)[1]
    assert not bool(behind.any())
    assert target.focal.shape == (2,) and at(sources, (0, 1)).position.shape == (3,)


def test_a_camera_stands_upright():
    zero = torch.zeros(3)
    camera = look_at(torch.tensor([0.0, 0.0, -2.0]), zero, torch.tensor(10.0), 11, 11)
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    where, inside = project(camera, points)
    # What is higher is further up in the image; seen along +z, +x is at the left.
    torch.testing.assert_close(where, torch.tensor([[5.0, 5.0], [5.0, 0.0], [0.0, 5.0]]))
    assert bool(inside.all())
    torch.testing.assert_close(torch.linalg.det(camera.rotation), torch.tensor(1.0))


def test_sampled_images():
    images = torch.rand(2, 3, 5, 7)
    there = all_pixels(5, 7).expand(2, -1, 2)
    torch.testing.assert_close(sample_images(images, there, 5, 7), images.flatten(2).mT)
    between = torch.tensor([[[0.5, 0.0]], [[3.0, 2.25]]])
    wanted = torch.stack(
        [images[0, :, 0, :2].mean(1), 0.75 * images[1, :, 2, 3] + 0.25 * images[1, :, 3, 3]]
    )
    torch.testing.assert_close(sample_images(images, between, 5, 7)[:, 0], wanted)
    # An image of half the size shows the same: its corners are the corners.
    small = images[..., ::2, ::2]
    corner = torch.tensor([[[6.0, 4.0]]]).expand(2, 1, 2)
    torch.testing.assert_close(sample_images(small, corner, 5, 7)[:, 0], images[..., -1, -1])


def test_ray_differences():
    points = torch.tensor([[0.0, 0.0, 0.0]])
    target = torch.tensor([2.0, 0.0, 0.0])
    sources = torch.tensor([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0]])
    found = ray_differences(points, target, sources)
    half = math.sqrt(0.5)
    torch.testing.assert_close(
        found, torch.tensor([[[half, -half, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    )

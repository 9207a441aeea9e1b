"""The analytic scenes, by cases that are known and by plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from bench.studies.gntmove.scenes import (
    AMBIENT,
    FAR,
    GLOSS,
    MATERIALS,
    SHINE,
    Scenes,
    all_pixels,
    at,
    draw_cameras,
    draw_scenes,
    photograph,
    see,
    trace,
)
from bench.studies.gntmove.training import draw_batch, draw_unseen
from tests.zoo.gntmove.test_cameras import generator

from moe_ops.zoo.gntmove.cameras import rays


def one_scene(**changes):
    """A unit-size sphere at the left and a box at the right, lit from above."""
    made = Scenes(
        centers=torch.tensor([[[-1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]]),
        sizes=torch.tensor([[[0.5, 0.5, 0.5], [0.5, 0.5, 0.25]]]),
        spheres=torch.tensor([[True, False]]),
        colors=torch.tensor([[[0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.5, 0.5, 0.5]]]),
        waves=torch.zeros(1, 3, 3),
        glossy=torch.tensor([False]),
        light=torch.tensor([[0.0, 1.0, 0.0]]),
        sky=torch.tensor([[0.9, 0.9, 1.0]]),
        material=torch.tensor([0]),
    )
    return made._replace(**changes)


def ray(origin, direction):
    d = torch.tensor(direction)
    return torch.tensor(origin)[None, None], (d / d.norm())[None, None]


@pytest.mark.parametrize(
    ("origin", "direction", "depth", "normal", "thing"),
    [
        ((-1.0, 0.5, -3.0), (0.0, 0.0, 1.0), 2.5, (0.0, 0.0, -1.0), 0),
        ((1.0, 0.5, -3.0), (0.0, 0.0, 1.0), 2.75, (0.0, 0.0, -1.0), 1),
        ((1.2, 3.0, 0.1), (0.0, -1.0, 0.0), 2.0, (0.0, 1.0, 0.0), 1),
        ((4.0, 0.5, 0.0), (-1.0, 0.0, 0.0), 2.5, (1.0, 0.0, 0.0), 1),
        ((0.0, 2.0, 3.0), (0.0, -1.0, 0.0), 2.0, (0.0, 1.0, 0.0), 2),
        ((0.0, 2.0, 0.0), (0.0, 1.0, 0.1), FAR, None, 3),
    ],
)
def test_what_a_ray_meets(origin, direction, depth, normal, thing):
    hits = trace(one_scene(), *ray(origin, direction))
    assert float(hits.depth) == pytest.approx(depth) and int(hits.thing) == thing
    if normal is not None:
        torch.testing.assert_close(hits.normal[0, 0], torch.tensor(normal))


def test_the_first_thing_is_the_nearest():
    """Depths of random rays against a march in small steps."""
    scenes = draw_scenes(1, generator(3))
    target, _ = draw_cameras(1, 1, 8, generator(4))
    origins, directions = rays(target, all_pixels(8, 8)[None])
    hits = trace(scenes, origins, directions)
    steps = torch.arange(0, 8, 0.01)
    for number in range(64):
        points = origins[0, number] + steps[:, None] * directions[0, number]
        inside = points[:, 1] < 0
        for center, size, ball in zip(
            scenes.centers[0], scenes.sizes[0], scenes.spheres[0], strict=True
        ):
            away = points - center
            within = (away.norm(dim=-1) < size[0]) if ball else (away.abs() < size).all(-1)
            inside = inside | within
        first = float(steps[inside.int().argmax()]) if bool(inside.any()) else FAR
        depth = float(hits.depth[0, number])
        # A ray may graze a thing for less than a step, and the march ends at 8.
        assert depth >= 8 or depth - 1e-3 <= first <= depth + 0.3, number


def test_light_and_materials():
    top = ray((1.0, 3.0, 0.0), (0.0, -1.0, 0.0))
    side = ray((1.0, 0.5, -3.0), (0.0, 0.0, 1.0))
    green = torch.tensor([0.2, 0.8, 0.2])
    torch.testing.assert_close(see(one_scene(), *top)[0, 0], green)
    torch.testing.assert_close(see(one_scene(), *side)[0, 0], AMBIENT * green)
    up = ray((0.0, 2.0, 0.0), (0.0, 1.0, 0.1))
    torch.testing.assert_close(see(one_scene(), *up)[0, 0], torch.tensor([0.9, 0.9, 1.0]))
    glossy = one_scene(glossy=torch.tensor([True]), material=torch.tensor([1]))
    # Seen from where the light is, the highlight is at its brightest.
    torch.testing.assert_close(see(glossy, *top)[0, 0], (green + GLOSS).clamp(max=1))
    slanted = ray((1.0, 3.0, -2.0), (0.0, -2.0, 2.0))
    halfway = torch.tensor([0.0, 1 + math.sqrt(0.5), -math.sqrt(0.5)])
    shine = float(halfway[1] / halfway.norm()) ** SHINE
    torch.testing.assert_close(see(glossy, *slanted)[0, 0], (green + GLOSS * shine).clamp(max=1))
    waves = torch.full((1, 3, 3), 2.0)
    textured = one_scene(waves=waves, material=torch.tensor([2]))
    pattern = (math.sin(2.0) + math.sin(2.0) + math.sin(0.0)) / 3
    wanted = (green * (0.6 + 0.6 * pattern)).clamp(0, 1)
    torch.testing.assert_close(see(textured, *top)[0, 0], wanted)


def test_photographs_and_drawn_scenes():
    scenes = draw_scenes(3, generator())
    target, sources = draw_cameras(3, 2, 8, generator())
    images = photograph(scenes, sources)
    assert images.shape == (3, 2, 3, 8, 8) and 0 <= images.min() and images.max() <= 1
    one = at(sources, (slice(None), 1))
    color = see(scenes, *rays(one, torch.tensor([[[5.0, 2.0]]]).expand(3, 1, 2)))
    torch.testing.assert_close(images[:, 1, :, 2, 5], color[:, 0])
    # Things stand on the floor, and do not reach into the cameras.
    assert bool((scenes.centers[..., 1] - scenes.sizes[..., 1]).abs().max() < 1e-6)
    assert target.position.norm(dim=-1).min() > 2
    again = draw_scenes(3, generator())
    assert all(torch.equal(a, b) for a, b in zip(scenes, again, strict=True))
    assert draw_scenes(2, generator(), material=1).glossy.all()
    assert draw_unseen(4, generator(), views=1, size=8).scenes.material.tolist() == [0, 1, 2, 0]
    assert len(MATERIALS) == 3


def test_batches_are_pairs_of_neighbors():
    batch = draw_batch(generator(), scenes=2, views=1, count=6, size=8)
    a, b = batch.pixels.view(-1, 2)[batch.pairs].unbind(1)
    assert batch.pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert bool(((b - a).sum(-1) == 1).all()) and bool(((b - a) >= 0).all())
    assert b.max() <= 7 and batch.colors.shape == (2, 6, 3)

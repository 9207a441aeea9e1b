"""Training on generated scenes, and evaluation on unseen scenes.

Letters: S scenes, V source views, R rays of a scene, N pairs of neighboring rays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops import _files
from moe_ops._fields import check_choice
from moe_ops.viz import plot_images
from moe_ops.viz._canvas import import_matplotlib
from moe_ops.zoo.gntmove.cameras import Cameras, rays
from moe_ops.zoo.gntmove.model import GNTMove, GNTMoveConfig, Rendered, Views

from ..images import import_ssim, mutual_information, psnr, ssim
from ..progress import bar
from ..settings import settings_folder
from ..trainer import Group, Lesson, train_once, train_steps
from .scenes import (
    MATERIALS,
    Scenes,
    all_pixels,
    at,
    draw_cameras,
    draw_scenes,
    photograph,
    see,
)

# Arms of the command: differences between the compared models. A point uses K experts and the
# permanent one: the network of "wide" has as many active parameters.
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"ffn": "dense"},
    "wide": {"ffn": "dense", "dense_ratio": 12},
    "moe": {"consistency_weight": 0.0},
    "move": {},
}


class Batch(NamedTuple):
    """Training batch. views: of S scenes. target: cameras [S]. pixels: [S, R, 2] of the target
    images; ray 2 i + 1 is the right or lower neighbor of ray 2 i. colors: [S, R, 3]. pairs: [N, 2],
    N = S R / 2."""

    views: Views
    target: Cameras
    pixels: Tensor
    colors: Tensor
    pairs: Tensor


class Unseen(NamedTuple):
    """Test scenes: source views, target cameras [S] and their images [S, 3, h, w]."""

    scenes: Scenes
    views: Views
    target: Cameras
    images: Tensor


Batches = Callable[[torch.Generator], Batch]


def draw_batch(
    generator: torch.Generator,
    *,
    scenes: int = 2,
    views: int = 4,
    count: int = 64,
    size: int = 48,
) -> Batch:
    """Draws new scenes, views of them, and pairs of neighboring rays of a further view.

    Args:
        count: rays of a scene, even. size: of images.
    """
    drawn = draw_scenes(scenes, generator)
    target, sources = draw_cameras(scenes, views, size, generator)
    first = torch.randint(size - 1, (scenes, count // 2, 2), generator=generator)
    right = torch.randint(2, (scenes, count // 2), generator=generator)
    second = first + torch.stack([right, 1 - right], -1)
    pixels = torch.stack([first, second], 2).flatten(1, 2).float()
    colors = see(drawn, *rays(target, pixels))
    pairs = torch.arange(scenes * count).view(-1, 2)
    return Batch(Views(photograph(drawn, sources), sources), target, pixels, colors, pairs)


def draw_unseen(
    count: int, generator: torch.Generator, *, views: int = 4, size: int = 48
) -> Unseen:
    """Draws scenes of each material in turn."""
    parts = [draw_scenes(1, generator, material=i % len(MATERIALS)) for i in range(count)]
    scenes = Scenes(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    target, sources = draw_cameras(count, views, size, generator)
    one = at(target, (slice(None), None))
    return Unseen(
        scenes, Views(photograph(scenes, sources), sources), target, photograph(scenes, one)[:, 0]
    )


@torch.no_grad()
def render(
    model: GNTMove,
    views: Views,
    target: Cameras,
    *,
    depths: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Renders images [S, 3, h, w] of target cameras [S], not clipped.

    Args:
        depths: [S, h * w, P], of the points of each ray. chunk: rays at once.
    """
    before = model.training
    model.eval()
    scenes = len(target.focal)
    pixels = all_pixels(target.height, target.width).to(views.images).expand(scenes, -1, 2)
    features = model.image_features(views.images)
    made = []
    for start in range(0, pixels.shape[1], chunk):
        part = slice(start, start + chunk)
        given = None if depths is None else depths[:, part]
        out = model(views, target, pixels[:, part], depths=given, features=features)
        made.append(out.colors)
    model.train(before)
    colors = torch.cat(made, 1).transpose(1, 2)
    return colors.reshape(scenes, 3, target.height, target.width)


def lesson(
    model: GNTMove,
    batches: Batches = draw_batch,
    *,
    rate: float = 1e-3,
    warm_up: int = 50,
    weight_decay: float = 0.0,
) -> Lesson:
    """Returns the training on batches of rays; the published run has Adam with 5e-4 (1e-3 for the
    features), halved every 50,000 of 250,000 steps, and 2048 rays of one scene per step.

    Args:
        batches: function from the run's generator to a batch.
    """

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return model.loss(*batches(generator), generator=generator)._asdict()

    return Lesson([Group(list(model.parameters()), rate, warm_up, weight_decay)], loss)


@torch.no_grad()
def evaluate(
    model: GNTMove, data: Unseen, *, with_ssim: bool = False, progress: bool = True
) -> dict[str, float]:
    """Evaluates a model on unseen scenes.

    Returns:
        "psnr" in dB, the mean over scenes, and "psnr diffuse" and so on of those of that material;
        with `with_ssim` "ssim"; of models with experts what `routing_of` says.
    """
    made = []
    with bar(len(data.images), "render", progress) as shown:
        for number in range(len(data.images)):
            one = part_of(data, number)
            made.append(render(model, one.views, one.target).clamp(0, 1))
            shown.update()
    images = torch.cat(made)
    values = psnr(images, data.images)
    found = {"psnr": float(values.mean())}
    for number in sorted(set(data.scenes.material.tolist())):
        of = values[data.scenes.material == number]
        found[f"psnr {MATERIALS[number]}"] = float(of.mean())
    if with_ssim:
        found["ssim"] = float(ssim(images, data.images).mean())
    if model.config.ffn == "moe":
        found.update(routing_of(model, data))
    return found


def part_of(data: Unseen, number: int) -> Unseen:
    """Returns one scene."""
    one = slice(number, number + 1)
    views = Views(data.views.images[one], at(data.views.cameras, one))
    scene = Scenes(*(tensor[one] for tensor in data.scenes))
    return Unseen(scene, views, at(data.target, one), data.images[one])


@torch.no_grad()
def routing_of(model: GNTMove, data: Unseen, count: int = 128) -> dict[str, float]:
    """Measures routing of neighboring points, over `count` pairs of rays of each scene, the mean
    over layers.

    Returns:
        "neighbour divergence": `consistency_loss`. "neighbour agreement": of the experts chosen at
        a point the share that its neighbor has too. "entropy": of the distribution over experts,
        in nats; a low divergence is uninformative if the distribution is uniform. "effective
        experts": exp of the entropy of the load. "information": what experts tell about the
        material, in nats.
    """
    before = model.training
    model.eval()
    draw = torch.Generator().manual_seed(0)
    size = data.target.width
    first = torch.randint(size - 1, (len(data.images), count, 2), generator=draw)
    pixels = torch.stack([first, first + torch.tensor([1, 0])], 2).flatten(1, 2).float()
    pairs = torch.arange(pixels[..., 0].numel()).view(-1, 2)
    out = model(data.views, data.target, pixels)
    model.train(before)
    rows, points = out.points.shape[:2]
    material = data.scenes.material.repeat_interleave(rows // len(data.images) * points)
    found = {"neighbour divergence": float(model.disagreement(out, pairs))}
    per_layer = [_of_layer(out, number, pairs, material) for number in range(len(out.routed))]
    for name in per_layer[0]:
        found[name] = sum(layer[name] for layer in per_layer) / len(per_layer)
    return found


def _of_layer(out: Rendered, number: int, pairs: Tensor, material: Tensor) -> dict[str, float]:
    routed = out.routed[number]
    shape = out.points.shape[:2]
    chosen = torch.zeros_like(routed.logits).scatter(1, routed.routing.topk_ids.long(), 1.0)
    counts = torch.stack([chosen[material == kind].sum(0) for kind in range(len(MATERIALS))])
    load = chosen.sum(0) / chosen.sum()
    a, b = (chosen.unflatten(0, shape)[pairs[:, side]] for side in (0, 1))
    shares = routed.logits.softmax(-1)
    return {
        "neighbour agreement": float((a * b).sum() / a.sum()),
        "entropy": float(-torch.xlogy(shares, shares).sum(-1).mean()),
        "effective experts": float(torch.exp(-torch.xlogy(load, load).sum())),
        "information": mutual_information(counts),
    }


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        arms: names in `ARMS`.
        steps, scenes, rays, rate: of training: fresh scenes of a step and rays of each.
        size, views: of the images in pixels, and source images of a scene.
        hidden_size, num_layers, num_points, num_experts, top_k: of the models.
        consistency_weight: of the arm "move".
        test_scenes: rendered whole.
        ssim: 1: measure structural similarity, which needs torchmetrics.
        pictures: scenes that are drawn, 0: none, which needs no matplotlib.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    steps: int = 2000
    scenes: int = 2
    rays: int = 64
    rate: float = 2e-3
    size: int = 48
    views: int = 4
    hidden_size: int = 32
    num_layers: int = 4
    num_points: int = 16
    num_experts: int = 4
    top_k: int = 2
    consistency_weight: float = 0.2
    test_scenes: int = 24
    ssim: int = 1
    pictures: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("Settings", "arm", arm, ARMS)

    def config(self, arm: str) -> GNTMoveConfig:
        names = (
            "hidden_size", "num_layers", "num_points", "num_experts", "top_k", "consistency_weight"
        )  # fmt: skip
        sizes = {name: getattr(self, name) for name in names}
        return dataclasses.replace(GNTMoveConfig.tiny(), **{**sizes, **ARMS[arm]})


# Settings that may differ between two commands on one folder: the models are unaffected.
_FREE = ("arms", "test_scenes", "ssim", "pictures")


def train(
    folder: Path | str, settings: Settings | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Trains each arm, renders unseen scenes, draws novel views beside the true ones (views.png);
    writes and returns report.json.

    Finished parts are not repeated; interrupted ones continue from their checkpoints.

    Raises:
        ValueError: the folder has other settings. ImportError: a package for SSIM or pictures is
            missing.
    """
    settings = settings or Settings()
    if settings.ssim:
        import_ssim()
    if settings.pictures:
        import_matplotlib()
    folder, now = settings_folder(folder, settings, "models", _FREE)

    def batches(generator: torch.Generator) -> Batch:
        return draw_batch(
            generator, scenes=settings.scenes, views=settings.views, count=settings.rays,
            size=settings.size,
        )  # fmt: skip

    fresh = torch.Generator().manual_seed(settings.seed + 10_000)
    sizes = {"views": settings.views, "size": settings.size}
    data = draw_unseen(settings.test_scenes, fresh, **sizes)
    report: dict[str, Any] = {"settings": now, "arms": {}}
    models = {}
    for arm in settings.arms:
        torch.manual_seed(settings.seed)
        model = models[arm] = GNTMove(settings.config(arm))

        def run(checkpoint: Path, model: GNTMove = model) -> None:
            train_steps(
                f"fit gntmove {model.config.ffn}", model,
                *lesson(model, batches, rate=settings.rate), steps=settings.steps,
                seed=settings.seed, checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        train_once(model, folder, arm, run)
        report["arms"][arm] = evaluate(
            model, data, with_ssim=bool(settings.ssim), progress=progress
        )
    if settings.pictures:
        draw(models, data, settings.pictures, folder / "views.png")
    _files.write_json(folder / "report.json", report)
    return report


def draw(
    models: dict[str, GNTMove], data: Unseen, count: int, path: Path, *, size: float = 1.6
) -> None:
    """Draws novel views of the first scenes: the source view nearest to the target, each model's
    rendering, and the true image."""
    count = min(count, len(data.images))
    columns: dict[str, list[Tensor]] = {name: [] for name in ("a source view", *models, "truth")}
    notes: dict[str, list[str]] = {name: [] for name in models}
    for number in range(count):
        one = part_of(data, number)
        away = (one.views.cameras.position[0] - one.target.position).norm(dim=-1)
        columns["a source view"].append(one.views.images[0, int(away.argmin())])
        for arm, model in models.items():
            made = render(model, one.views, one.target).clamp(0, 1)
            columns[arm].append(made[0])
            notes[arm].append(f"{float(psnr(made, one.images)):.1f} dB")
        columns["truth"].append(one.images[0])
    names = [MATERIALS[kind] for kind in data.scenes.material[:count].tolist()]
    title = "Novel views of scenes not seen in training"
    plot_images(columns, notes=notes, row_names=names, title=title, size=size, path=path)

"""Training on crops of photos in generated weather, and what is measured of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops import _files
from moe_ops._fields import check_choice
from moe_ops.viz import plot_images
from moe_ops.viz._canvas import import_matplotlib
from moe_ops.zoo.mofme import MoFME, RestorationTransformer

from ..images import import_ssim, mutual_information, psnr, ssim
from ..progress import bar
from ..settings import settings_folder
from ..trainer import Group, Lesson, train_once, train_steps
from .rivals import FFNMixture, Restoration, RivalConfig
from .tiles import restore
from .weather import WEATHER, Degraded, crops, degrade, load_photos

Batches = Callable[[torch.Generator], Degraded]
# Arms of the command: what differs between the models that are compared.
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"experts": "dense"},
    "ffn": {"experts": "ffn", "router": "plain"},
    "film-plain": {"experts": "film", "router": "plain"},
    "film": {"experts": "film", "router": "uncertainty"},
}
TEST_BATCH = 50


def lesson(
    model: RestorationTransformer,
    batches: Batches,
    *,
    rate: float = 1e-3,
    warm_up: int = 50,
    weight_decay: float = 0.01,
) -> Lesson:
    """The smooth L1 distance; the published run adds 0.04 times a perceptual loss by VGG16, whose
    weights are not here, and has a rate of 2e-4, batches of 64 and 200 epochs.

    Args:
        batches: from the generator of the run to a batch.
    """

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = batches(generator)
        return {"loss": F.smooth_l1_loss(model(batch.degraded)[0], batch.clean)}

    return Lesson([Group(list(model.parameters()), rate, warm_up, weight_decay)], loss)


@torch.no_grad()
def evaluate(
    model: RestorationTransformer,
    data: Degraded,
    *,
    with_ssim: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Measures a model on crops.

    Returns:
        "psnr" in dB, the mean over crops, and "psnr rain" and so on of those in that weather; with
        `with_ssim` "ssim"; of models with experts "information": what the experts of a token tell
        about the weather, in nats, the mean over layers.
    """
    before = model.training
    model.eval()
    config = model.config
    made, tables = [], torch.zeros(config.num_layers, len(WEATHER), config.num_experts)
    experts = config.experts if isinstance(config, RivalConfig) else "film"
    with bar(len(data.degraded), f"evaluate {experts}", progress) as shown:
        for start in range(0, len(data.degraded), TEST_BATCH):
            batch = data.degraded[start : start + TEST_BATCH]
            weather = data.weather[start : start + TEST_BATCH]
            restored, routing = model(batch)
            made.append(restored.clamp(0, 1))
            for table, routed in zip(tables, routing, strict=False):
                of = weather.repeat_interleave(len(routed.topk_ids) // len(batch))
                for slot in routed.topk_ids.long().T:
                    table.index_put_((of, slot), torch.ones(len(of)), accumulate=True)
            shown.update(len(batch))
    model.train(before)
    images = torch.cat(made)
    found = {"psnr": float(psnr(images, data.clean).mean())}
    found.update(by_weather(psnr(images, data.clean), data.weather))
    if with_ssim:
        found["ssim"] = float(ssim(images, data.clean).mean())
    if routing:
        told = [mutual_information(table) for table in tables]
        found["information"] = sum(told) / len(told)
    return found


def by_weather(values: Tensor, weather: Tensor) -> dict[str, float]:
    """Means over the images in each weather that there is."""
    present = sorted(set(weather.tolist()))
    return {f"psnr {WEATHER[kind]}": float(values[weather == kind].mean()) for kind in present}


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        arms: names in `ARMS`.
        photos: a folder of images; "": what installed packages bring.
        weather: kinds of it.
        steps, batch_size, crop, rate: of training; `crop` is the side of crops in pixels.
        hidden_size, num_layers, num_experts, top_k, mlp_ratio: of the models.
        test_crops: of the photos kept for the test.
        ssim: 1: measure structural similarity, which needs torchmetrics.
        pictures: photos that are restored for the picture, 0: none, which needs no matplotlib.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    photos: str = ""
    weather: tuple[str, ...] = WEATHER
    steps: int = 1500
    batch_size: int = 18
    crop: int = 32
    rate: float = 2e-3
    hidden_size: int = 96
    num_layers: int = 2
    num_experts: int = 8
    top_k: int = 2
    mlp_ratio: int = 4
    test_crops: int = 300
    ssim: int = 1
    pictures: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("Settings", "arm", arm, ARMS)
        for kind in self.weather:
            check_choice("Settings", "weather", kind, WEATHER)

    def config(self, arm: str) -> RivalConfig:
        names = ("hidden_size", "num_layers", "num_experts", "top_k", "mlp_ratio")
        sizes = {name: getattr(self, name) for name in names}
        return dataclasses.replace(RivalConfig.tiny(), **sizes, **ARMS[arm])


# What may differ between two commands on one folder: the models stay the same.
_FREE = ("arms", "test_crops", "ssim", "pictures")


def train(
    folder: Path | str, settings: Settings | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Trains each arm, evaluates all on the same crops, draws restored photos (restored.png);
    writes and returns report.json.

    What is done is not done again; what was cut goes on from its checkpoint.

    Raises:
        ValueError: the folder is of other settings. ImportError: what SSIM or pictures need is
            missing. FileNotFoundError: there are no photos.
    """
    settings = settings or Settings()
    if settings.ssim:
        import_ssim()
    if settings.pictures:
        import_matplotlib()
    photos, kept_photos = load_photos(settings.photos)
    folder, now = settings_folder(folder, settings, "models", _FREE)

    def batches(generator: torch.Generator) -> Degraded:
        clean = crops(photos, settings.batch_size, settings.crop, generator)
        return degrade(clean, generator, settings.weather)

    fresh = torch.Generator().manual_seed(settings.seed + 10_000)
    data = degrade(
        crops(kept_photos, settings.test_crops, settings.crop, fresh), fresh, settings.weather
    )
    untouched = psnr(data.degraded, data.clean)
    report: dict[str, Any] = {
        "settings": now,
        "arms": {
            "degraded": {"psnr": float(untouched.mean()), **by_weather(untouched, data.weather)}
        },
    }
    models: dict[str, RestorationTransformer] = {}
    for arm in settings.arms:
        torch.manual_seed(settings.seed)
        model = models[arm] = Restoration(settings.config(arm))

        def run(checkpoint: Path, model: Restoration = model) -> None:
            train_steps(
                f"fit mofme {model.config.experts}", model,
                *lesson(model, batches, rate=settings.rate), steps=settings.steps,
                seed=settings.seed, checkpoint=checkpoint, progress=progress,
            )  # fmt: skip

        train_once(model, folder, arm, run)
        found: dict[str, Any] = evaluate(
            model, data, with_ssim=bool(settings.ssim), progress=progress
        )
        report["arms"][arm] = {**found, "parameters": count_parameters(model)}
    if settings.pictures:
        draw(models, kept_photos, settings, folder / "restored.png")
    _files.write_json(folder / "report.json", report)
    return report


def count_parameters(model: RestorationTransformer) -> dict[str, int]:
    """Returns counts by name: "total", "experts" (in all layers, without routers), and "active":
    without those of the experts that a token does not use."""
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    mixtures = [part for part in model.modules() if isinstance(part, (MoFME, FFNMixture))]
    experts = sum(p.numel() for mixture in mixtures for p in mixture.experts.parameters())
    unused = experts * (config.num_experts - config.top_k) // config.num_experts
    return {"total": total, "experts": experts, "active": total - unused}


def draw(
    models: dict[str, RestorationTransformer],
    photos: list[Tensor],
    settings: Settings,
    path: Path,
    *,
    side: int = 128,
    size: float = 1.6,
) -> None:
    """Restored photos beside the degraded and the clean ones, by tiles of the training's size. Each
    row has another photo and another weather, as far as there are others."""
    generator = torch.Generator().manual_seed(settings.seed + 20_000)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("degraded", *models, "clean")}
    notes: dict[str, list[str]] = {name: [] for name in ("degraded", *models)}
    kinds = [settings.weather[i % len(settings.weather)] for i in range(settings.pictures)]
    for row, kind in enumerate(kinds):
        photo = photos[row % len(photos)]
        around = min(side, *photo.shape[1:])
        case = degrade(crops([photo], 1, around, generator), generator, [kind])
        images = {"degraded": case.degraded[0]}
        for arm, model in models.items():
            images[arm] = restore(model, case.degraded[0], settings.crop, settings.crop // 2)
        for name, image in images.items():
            columns[name].append(image)
            value = float(psnr(image.clamp(0, 1)[None], case.clean))
            notes[name].append(f"{value:.1f} dB")
        columns["clean"].append(case.clean[0])
    plot_images(
        columns, notes=notes, row_names=kinds, title="Photos restored", size=size, path=path
    )

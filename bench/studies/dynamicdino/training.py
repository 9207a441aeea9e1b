"""Training of a dense detector on generated scenes, MoE tuning, and evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ops import _files
from moe_ops._fields import check_choice
from moe_ops.zoo.dynamicdino import DynamicDino, DynamicDinoConfig

from ..settings import settings_folder
from ..trainer import Group, Lesson, load_weights, train_steps, write_state
from .metrics import average_precision, check_installed, co_selection, detect, pairs_kept
from .shapes import ALL, FIRST, HELD_OUT, KNOWN, Scenes, draw_scenes
from .starts import with_start

# Trained parameters, by transformers' names: attention between image and text, experts, heads.
_TUNED = (".fusion_layer.", ".fc1.", ".fc2.", "bbox_embed.", "class_embed.")
# Variants made from the dense detector; "dense" is unchanged.
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {},
    "random router": {"start": "random_router"},
    "random experts": {"start": "random_experts"},
    "copies": {"num_slices": 1},
}


def freeze(detector: Any) -> list[str]:
    """Restricts gradients to the parameters trained in MoE tuning: attention between image and text
    in the encoder, the decoder's feed-forward networks or experts, and the heads.

    Returns:
        Names of the parameters that are trained.
    """
    tuned = []
    for name, parameter in detector.named_parameters():
        ours = any(part in name for part in _TUNED)
        if ".encoder.layers." in name:
            ours = ".fusion_layer." in name
        parameter.requires_grad_(ours)
        if ours:
            tuned.append(name)
    return tuned


def lesson(
    model: DynamicDino,
    batches: Callable[[torch.Generator], Scenes],
    *,
    rate: float = 1e-3,
    warm_up: int = 50,
    weight_decay: float = 1e-4,
) -> Lesson:
    """Returns the training on scenes of all parameters that require a gradient (see `freeze`).

    Args:
        batches: function from the run's generator to scenes.
    """

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        scenes = batches(generator)
        found = model.loss(scenes.images, scenes.input_ids, scenes.labels)
        return {"loss": found.loss, "detection": found.detection, "balance": found.balance}

    trained = [p for p in model.parameters() if p.requires_grad]
    return Lesson([Group(trained, rate, warm_up, weight_decay)], loss)


def judge(model: DynamicDino, scenes: Scenes) -> dict[str, float]:
    """Returns AP and AP50 of the pairs in tuning and of the held-out pairs, and for a detector with
    experts routing statistics: means over layers of the fraction of queries that use whole copies,
    and of the largest load of an expert over the mean load, minus 1."""
    with model.recorded() as routing:
        found = detect(model, scenes)
    result: dict[str, float] = {}
    for name, pairs in (("known", KNOWN), ("held out", HELD_OUT)):
        precision = average_precision(found, scenes, pairs)
        result |= {f"{kind}, {name}": precision[kind] for kind in ("AP", "AP50")}
    if routing:
        count, layers = model.mixtures[0].experts.num_experts, len(model.mixtures)
        ids = [torch.cat([r.topk_ids for r in routing[i::layers]]) for i in range(layers)]
        slices = model.config.num_slices
        result["whole copies"] = sum(pairs_kept(i, slices) for i in ids) / layers
        loads = [co_selection(i, count).diagonal() for i in ids]
        result["max violation"] = sum(float(x.max() / x.mean()) - 1 for x in loads) / layers
    return result


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        arms: of `ARMS`; all are tuned from one dense detector.
        pretrain_steps: of the dense detector, on half of the pairs of a color and a shape.
        steps: of each arm, on all pairs but the held-out ones. batch_size: scenes of a step.
        rate: of pre-training, `tune_rate` of the arms.
        detector, num_copies, num_slices, hidden_size, num_layers, num_queries: see
            `DynamicDinoConfig`.
        tune_all: 1: train all parameters, not only those of MoE tuning.
        scenes: of the evaluation.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    pretrain_steps: int = 800
    steps: int = 300
    batch_size: int = 16
    rate: float = 1e-3
    tune_rate: float = 5e-4
    detector: str = "mm-grounding-dino"
    num_copies: int = 4
    num_slices: int = 2
    hidden_size: int = 64
    num_layers: int = 2
    num_queries: int = 16
    tune_all: int = 0
    scenes: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("Settings", "arms", arm, ARMS)


def train(
    folder: Path | str, settings: Settings | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Trains a dense detector, tunes each arm from it, evaluates; writes and returns report.json.

    Finished parts are not repeated; interrupted ones continue from their checkpoints.

    Raises:
        ImportError: pycocotools is not installed.
        ValueError: the folder has other settings.
    """
    check_installed()
    settings = settings or Settings()
    # Other arms and evaluation scenes can reuse the detector.
    folder, now = settings_folder(folder, settings, "detectors", ("arms", "scenes"))

    def trained(
        name: str, model: DynamicDino, pairs: tuple[int, ...], steps: int, rate: float
    ) -> DynamicDino:
        done = folder / f"{name}.pt"
        if done.exists():
            load_weights(model, done)
            return model
        state = folder / f"{name}.training.pt"
        scenes = partial(draw_scenes, settings.batch_size, pairs)
        train_steps(
            f"fit {name}",
            model,
            *lesson(model, scenes, rate=rate),
            steps=steps,
            seed=settings.seed,
            checkpoint=state,
            progress=progress,
        )
        write_state(done, model.state_dict())
        state.unlink(missing_ok=True)
        return model

    torch.manual_seed(settings.seed)
    names = ("detector", "hidden_size", "num_layers", "num_queries")
    config = DynamicDinoConfig(num_copies=0, **{n: getattr(settings, n) for n in names})
    scenes = draw_scenes(
        settings.scenes, ALL, torch.Generator().manual_seed(settings.seed + 10_000)
    )
    base = trained("pretrained", DynamicDino(config), FIRST, settings.pretrain_steps, settings.rate)
    report: dict[str, Any] = {"settings": now, "arms": {"pretrained": judge(base, scenes)}}
    for arm in settings.arms:
        model = start_arm(base, arm, settings)
        before = judge(model, scenes)
        file = arm.replace(" ", "-")
        model = trained(file, model, KNOWN, settings.steps, settings.tune_rate)
        found = judge(model, scenes)
        found |= {f"{name} at the start": before[name] for name in before if name[:2] == "AP"}
        report["arms"][arm] = found
    _files.write_json(folder / "report.json", report)
    return report


def start_arm(base: DynamicDino, arm: str, settings: Settings) -> DynamicDino:
    """Returns an arm before it is tuned."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    if arm == "dense":
        model = copy.deepcopy(base)
    else:
        sizes = {"num_copies": settings.num_copies, "num_slices": settings.num_slices}
        model = with_start(base, generator, **{**sizes, **ARMS[arm]})
    if not settings.tune_all:
        freeze(model.detector)
    return model

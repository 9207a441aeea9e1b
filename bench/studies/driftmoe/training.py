"""Runs of every arm over every stream in sequence, with results kept in a folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_ops import _files
from moe_ops._fields import check_choice
from moe_ops.zoo.driftmoe.experts import hoeffding_tree
from moe_ops.zoo.driftmoe.model import DriftMoE, DriftMoEConfig

from ..settings import settings_folder
from .picture import draw
from .prequential import prequential
from .random_router import RandomRouter
from .streams import STREAMS, Stream, import_river

# Arm -> preset and changes to it; arms without them are river's. Both "random_router" arms are a
# `RandomRouter`.
ARMS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "moe_data": ("moe_data", {}),
    "moe_data_vote": ("moe_data", {"prediction": "vote"}),
    "moe_task": ("moe_task", {}),
    "moe_task_vote": ("moe_task", {"prediction": "vote"}),
    "random_router": ("moe_data", {}),
    "random_router_vote": ("moe_data", {"prediction": "vote"}),
    "tree": None,
    "adaptive_forest": None,
}


def make_arm(arm: str, stream: Stream, seed: int, forest: int = 10) -> Any:
    """Returns a new classifier of this name: a `DriftMoE`, or one of river.

    Args:
        forest: trees of the adaptive random forest.
    """
    check_choice("make_arm", "arm", arm, ARMS)
    ours = ARMS[arm]
    if ours is not None:
        preset, changes = ours
        sizes: dict[str, Any] = {
            "num_features": stream.num_features,
            "num_classes": stream.num_classes,
        }
        base: DriftMoEConfig = getattr(DriftMoEConfig, preset)()
        made = RandomRouter if arm.startswith("random_router") else DriftMoE
        return made(dataclasses.replace(base, **sizes, **changes, seed=seed))
    if arm == "tree":
        return hoeffding_tree()
    return import_river().forest.ARFClassifier(n_models=forest, seed=seed)


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        streams: names of `STREAMS`. arms: names of `ARMS`.
        samples: examples of a stream; the published streams have a million.
        window: examples per point of the curves. delay: until classes are known.
        forest: trees of the adaptive random forest; 100 in the paper.
        picture: 0: draw no curves, which need matplotlib.
    """

    streams: tuple[str, ...] = ("led_a", "sea_a", "rbf_m")
    arms: tuple[str, ...] = ("moe_data", "moe_task", "random_router", "tree", "adaptive_forest")
    samples: int = 20_000
    window: int = 500
    delay: int = 0
    forest: int = 10
    picture: int = 1
    seed: int = 0


def train(
    folder: Path | str, settings: Settings | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Runs each arm over each stream; writes and returns report.json.

    Finished pairs are not repeated; interrupted ones run from their first example.

    Raises:
        ValueError: the folder has other settings, or an unknown stream or arm.
        ImportError: river is not installed.
    """
    settings = settings or Settings()
    for name in settings.streams:
        check_choice("train", "streams", name, STREAMS)
    for arm in settings.arms:
        check_choice("train", "arms", arm, ARMS)
    folder, now = settings_folder(folder, settings, "runs", ("streams", "arms", "picture"))
    report: dict[str, Any] = {"settings": now, "streams": {}}
    for name in settings.streams:
        stream = STREAMS[name]
        drifts = stream.drifts(settings.samples)
        of_stream: dict[str, Any] = {}
        for arm in settings.arms:
            path = folder / f"{name}-{arm}.json"
            if not path.exists():
                found = prequential(
                    make_arm(arm, stream, settings.seed, settings.forest),
                    stream.examples(settings.samples, settings.seed),
                    total=settings.samples,
                    window=settings.window,
                    delay=settings.delay,
                    detector=import_river().drift.ADWIN(),
                    what=f"{arm} on {name}",
                    progress=progress,
                )
                run = {**found.numbers(drifts), "seconds": round(found.seconds, 1)}
                _files.write_json(path, run)
            of_stream[arm] = _files.read_json(path)
        report["streams"][name] = {"drifts": drifts, "arms": of_stream}
    _files.write_json(folder / "report.json", report)
    if settings.picture:
        draw(report, folder / "curves.svg")
    return report

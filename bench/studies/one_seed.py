"""All runs of a study with one seed: how systems without settings of their own are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_ops import _files
from moe_ops._fields import check_choice

from . import queue, registry
from .settings import settings_folder


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        study: name of a study of the system, see ``--list``; "": its shortest one.
        runs: names of its runs, none for all.
        seed: the stored results have seeds from 10 on.
    """

    study: str = ""
    runs: tuple[str, ...] = ()
    seed: int = 0


def train(
    system: str, folder: Path | str, settings: Settings | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Does the runs of a study with one seed; writes and returns report.json.

    A run that is done is not done again; one that was cut goes on from its checkpoint.

    Raises:
        ValueError: the folder is of other settings, or an unknown study or run.
    """
    settings = settings or Settings()
    studies = {s.name: s for s in registry.experiment(system).studies}
    if settings.study:
        check_choice("train", "study", settings.study, studies)
    study = studies[settings.study or min(studies, key=lambda name: studies[name].minutes)]
    folder, now = settings_folder(folder, settings, "runs", ("runs",))
    report: dict[str, Any] = {"settings": now, "study": study.name, "arms": {}}
    for run in settings.runs or tuple(study.runs):
        check_choice("train", "runs", run, study.runs)
        item = queue.Item(study.name, run, settings.seed)
        path = item.checkpoint(folder).with_suffix(".json")
        if not path.is_file():
            if progress:
                print(f"{item}: about {study.minutes:.3g} min", flush=True)
            result = queue.perform(item, folder, float("inf"))
            _files.make_folder(path.parent)
            _files.write_json(path, result)
        report["arms"].update(_files.read_json(path)["rows"])
    _files.write_json(folder / "report.json", report)
    return report

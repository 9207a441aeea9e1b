"""The experiments there are, by the name of the system."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

from .study import Experiment, Study

NAMES = (
    "jetmoe", "deepseek", "moduleformer", "coe", "topp", "home", "mowst", "t2mir", "premoe",
    "uncurl", "super_experts", "scmoe", "expertflow", "bam", "factorllm", "composition",
    "adamoe", "sentence", "dynamicdino", "thor", "widenet", "gntmove", "mofme", "driftmoe",
    "recipes", "routing",
)  # fmt: skip


@cache
def experiment(system: str) -> Experiment:
    """That of a system.

    Raises:
        ValueError: a system without one.
    """
    if system not in NAMES:
        raise ValueError(f"experiment: system must be one of {', '.join(NAMES)}, got {system!r}.")
    module = f"{__package__}.{system}"
    if (Path(__file__).parent / system).is_dir():  # With training, data and arms of its own.
        module += ".claims"
    found: Experiment = importlib.import_module(module).EXPERIMENT
    return found


def studies(systems: tuple[str, ...] = ()) -> list[Study]:
    """Returns the studies of these systems, or of all."""
    return [s for name in systems or NAMES for s in experiment(name).studies]


def study(name: str) -> Study:
    """One by its name, which begins with that of its system.

    Raises:
        ValueError: no such study.
    """
    found = {s.name: s for s in experiment(name.split("-")[0]).studies}
    if name not in found:
        raise ValueError(f"study: name must be one of {', '.join(found)}, got {name!r}.")
    return found[name]

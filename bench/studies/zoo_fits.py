"""Runs of studies whose models the zoo's own training functions train."""

from __future__ import annotations

from typing import Any

from .study import Run


def resumed(run: Run, name: str, steps: int, every: int = 50) -> dict[str, Any]:
    """Arguments of a `fit` of the zoo that goes on from where an earlier start of the run was cut,
    and raises Paused when the run's time is over.

    The run's own checkpoint holds the seconds it took: a job begins with `run.load()`.

    Args:
        name: of the training, unique in the run. steps: its number of steps.
    """

    def watch(done: int) -> None:
        run.step(done, steps, dict)

    checkpoint = run.part(name).checkpoint
    return {"checkpoint": checkpoint, "every": every, "watch": watch, "progress": False}

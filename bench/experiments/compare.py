"""Series of pictures that compare arms: means over seeds, with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .report import means
from .training import Trained

Series = dict[str, dict[str, Any]]


def series(x: Sequence[Any], rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One series from one row of numbers a seed."""
    return means(x, list(zip(*rows, strict=True)))


def over_steps(arms: Mapping[str, Sequence[Sequence[float]]], every: int) -> Series:
    """Arm -> one curve a seed, to means of `every` steps each; a rest shorter than that goes."""
    found = {}
    for arm, curves in arms.items():
        count = len(curves[0]) // every
        blocks = [
            [sum(c[i * every : (i + 1) * every]) / every for i in range(count)] for c in curves
        ]
        found[arm] = series([(i + 0.5) * every for i in range(count)], blocks)
    return found


def against(results: Mapping[str, Sequence[Trained]], baseline: str) -> Series:
    """Held-out loss minus that of the baseline with the same seed: of each domain and the mean."""
    names = list(results[baseline][0].heldout)
    found = {}
    for arm, trained in results.items():
        if arm == baseline:
            continue
        rows = [
            [a.heldout[n] - b.heldout[n] for n in names] + [a.loss - b.loss]
            for a, b in zip(trained, results[baseline], strict=True)
        ]
        found[arm] = series([*names, "mean"], rows)
    return found

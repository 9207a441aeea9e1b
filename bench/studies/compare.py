"""Data series of figures that compare arms: means over seeds, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .picture import Picture
from .report import means
from .study import Results

Series = dict[str, dict[str, Any]]


def series(x: Sequence[Any], rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Returns a series from one row of numbers per seed."""
    return means(x, list(zip(*rows, strict=True)))


def bars(results: Results, arms: Sequence[str], columns: Mapping[str, str]) -> Series:
    """Returns for each label one bar per arm, from a column."""
    return {
        label: means(list(arms), [results.of(arm, column) for arm in arms])
        for label, column in columns.items()
    }


def bars_against(
    results: Results, arms: Sequence[str], baseline: str, columns: Mapping[str, str]
) -> Series:
    """Returns the bars minus the baseline's values for each seed."""
    return {
        label: means(list(arms), [results.gap(arm, baseline, column) for arm in arms])
        for label, column in columns.items()
    }


def over_steps(arms: Mapping[str, Sequence[Sequence[float]]], steps: int) -> Series:
    """Returns for each arm one thinned curve per seed, over `steps` steps."""
    found = {}
    for arm, curves in arms.items():
        count = len(curves[0])
        x = [(i + 0.5) * steps / count for i in range(count)]
        found[arm] = series(x, curves)
    return found


def against(results: Results, arms: Sequence[str], baseline: str) -> Series:
    """Returns held-out loss minus the baseline's for each seed, by domain and on average.

    Arms are run names.
    """
    found = {}
    for arm in arms:
        pairs = zip(results.every(arm, "heldout"), results.every(baseline, "heldout"), strict=True)
        rows = [{name: a[name] - b[name] for name in a} for a, b in pairs]
        names = list(rows[0])
        values = [[r[n] for n in names] + [sum(r.values()) / len(r)] for r in rows]
        found[arm] = series([*names, "mean"], values)
    return found


def loss_picture(results: Results, arms: Sequence[str], baseline: str) -> Picture:
    return Picture(
        "loss",
        f"Held-out loss against {baseline}, same seed",
        "",
        "difference, nats a byte",
        "bars",
        against(results, arms, baseline),
    )


def curves_picture(
    results: Results, arms: Sequence[str], steps: int, name: str, title: str, unit: str, of: str
) -> Picture:
    """Returns a picture of the runs' values under `of`, over the steps of training."""
    curves = {arm: results.every(arm, of) for arm in arms}
    return Picture(name, title, "step", unit, "lines", over_steps(curves, steps))

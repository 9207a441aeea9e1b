"""Plots of the experts of a trained model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._canvas import AT_EDGE, INK, PALETTE, annotate, despine, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_expert_scores(
    panels: Mapping[str, Sequence[Any]],
    *,
    layer_names: Sequence[str] | None = None,
    title: str = "Experts by layer",
    path: str | Path | None = None,
) -> Figure:
    """Draws heat maps of one value per expert, with one row per layer and one panel per kind of
    value.

    panels: label -> [experts] of each layer, arrays or tensors; layers may differ in their number
    of experts, and NaN is a missing value. Each panel has a separate scale, from 0 (or its minimum)
    to its maximum.
    """
    if not panels or not all(len(rows) for rows in panels.values()):
        raise ValueError(
            f"plot_expert_scores: panels must hold a layer each, got {list(panels) or 'none'}"
        )
    num_layers = max(len(rows) for rows in panels.values())
    width = max(len(row) for rows in panels.values() for row in rows)
    figure = new_figure(4.6 * len(panels) + 0.8, max(2.0, 0.28 * num_layers + 1.3))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, rows) in zip(grid, panels.items(), strict=True):
        values = np.full((len(rows), width), np.nan)
        for index, row in enumerate(rows):
            values[index, : len(row)] = np.asarray(row, dtype=np.float64)
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=min(0.0, float(np.nanmin(values))),
        )
        axes.set_title(label, loc="left", fontsize=9)
        axes.set_xlabel("expert")
        axes.set_xticks(range(0, width, max(1, math.ceil(width / 10))))
        axes.tick_params(length=2)
        figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    names = layer_names or [f"layer {index}" for index in range(num_layers)]
    every = max(1, math.ceil(num_layers / 32))
    ticks = range(0, num_layers, every)
    grid[0].set_yticks(ticks, [names[tick] for tick in ticks], fontsize=7)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return finish(figure, path)


def plot_largest_outputs(
    largest: Sequence[Any],
    *,
    threshold: float | None = None,
    marked: Iterable[tuple[int, int]] = (),
    title: str = "Largest output of each expert",
    path: str | Path | None = None,
) -> Figure:
    """Draws one dot per expert: its largest output over a text by layer, on a logarithmic scale.

    largest: [experts] of each layer; experts without output (0) are omitted.
    threshold: value of a horizontal line.
    marked: (layer, expert) pairs to label.
    """
    if not len(largest):
        raise ValueError("plot_largest_outputs: largest must hold a layer, got none")
    named = set(marked)
    figure = new_figure(max(6.0, 0.28 * len(largest) + 3.0), 4.2)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for layer, row in enumerate(largest):
        values = np.asarray(row, dtype=np.float64)
        here = sorted(expert for index, expert in named if index == layer)
        plain = [e for e, value in enumerate(values) if value > 0 and e not in here]
        axes.plot([layer] * len(plain), values[plain], "o", color=PALETTE[7], markersize=3)
        axes.plot([layer] * len(here), values[here], "o", color=PALETTE[5], markersize=6)
        for expert in here:
            annotate(axes, f"expert {expert}", (layer, values[expert]), (6, 0), va="center")
    if threshold is not None and threshold > 0:
        axes.axhline(threshold, color=INK, linewidth=1.0, linestyle="--")
        style = {"ha": "right", "fontsize": 8}
        annotate(axes, f"threshold {threshold:.3g}", (1.0, threshold), (-4, 3), **AT_EDGE, **style)
    axes.set_xlabel("routed layer")
    axes.set_ylabel("max |output|")
    axes.set_xlim(-0.7, len(largest) + 0.3)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    despine(axes)
    return finish(figure, path)

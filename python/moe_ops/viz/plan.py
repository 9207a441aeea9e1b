"""Plot of an expert parallelism plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._canvas import IN_DATA, INK, PALETTE, annotate, despine, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_plan(
    memory: Mapping[str, float],
    available: float,
    passes: Mapping[str, Mapping[str, float]],
    sizes: Sequence[tuple[int, float, float]] = (),
    *,
    chosen: int | None = None,
    title: str = "Plan",
    path: str | Path | None = None,
) -> Figure:
    """Draws a plan of `moe_ops.parallel.plan`: memory of a rank, time of a layer, and other EP
    sizes.

    memory: bytes by purpose.
    available: bytes of a device.
    passes: seconds by purpose, for "forward" and other passes.
    sizes: (EP size, bytes, seconds per step) each.
    chosen: the EP size of the plan.
    """
    gib = 2.0**30
    figure = new_figure(10.0, 6.4 if sizes else 3.6)
    rows = figure.subplots(3 if sizes else 2, 1, height_ratios=[1, 1.4, 2][: 3 if sizes else 2])
    bars, times = rows[0], rows[1]
    _stack(bars, [("a rank", {name: size / gib for name, size in memory.items()})])
    bars.axvline(available / gib, color=INK, linewidth=1.4, linestyle="--")
    annotate(bars, "device", (available / gib, 1.0), (0, 2), ha="center", **IN_DATA)
    bars.set_xlabel("memory, GiB")
    _stack(
        times, [(name, {k: v * 1e3 for k, v in parts.items()}) for name, parts in passes.items()]
    )
    times.set_xlabel("a layer with experts, ms, one after another")
    if sizes:
        axes, labels = rows[2], [str(ep) for ep, _, _ in sizes]
        colors = [PALETTE[5 if ep == chosen else 7] for ep, _, _ in sizes]
        axes.bar(labels, [size / gib for _, size, _ in sizes], color=colors)
        axes.axhline(available / gib, color=INK, linewidth=1.2, linestyle="--")
        axes.set_xlabel("EP size")
        axes.set_ylabel("memory, GiB")
        steps = axes.twinx()
        steps.plot(labels, [step for _, _, step in sizes], color=PALETTE[4], marker="o")
        steps.set_ylabel("step, s", color=PALETTE[4])
        steps.set_ylim(bottom=0)
        steps.spines["top"].set_visible(False)
        axes.spines["top"].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return finish(figure, path)


def _stack(axes: Any, bars: list[tuple[str, dict[str, float]]]) -> None:
    """Draws stacked horizontal bars, the first on top, with the names of their parts."""
    names = list(dict.fromkeys(name for _, parts in bars for name, size in parts.items() if size))
    left = np.zeros(len(bars))
    labels = [label for label, _ in bars]
    for index, name in enumerate(names):
        widths = np.array([parts.get(name, 0.0) for _, parts in bars])
        color = PALETTE[index % len(PALETTE)]
        axes.barh(labels, widths, left=left, color=color, label=name, height=0.6)
        left += widths
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    despine(axes)

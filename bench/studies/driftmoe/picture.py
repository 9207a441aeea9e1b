"""Curves of accuracy over streams."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .streams import STREAMS


def draw(report: Mapping[str, Any], path: Path | str) -> None:
    """Draws accuracy over each stream, one line per arm, with sudden and gradual drifts in gray.

    Args:
        report: of `train`. path: of an SVG, PNG or PDF file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from moe_ops.viz import _canvas

    streams = report["streams"]
    figure = _canvas.new_figure(7.6, 2.5 * len(streams))
    every = figure.subplots(len(streams), squeeze=False)[:, 0]
    for axes, (name, found) in zip(every, streams.items(), strict=True):
        for place in found["drifts"]:
            axes.axvline(place, color=_canvas.GRID, zorder=0)
        for arm, run in found["arms"].items():
            x = [(i + 0.5) * run["window"] for i in range(len(run["curve"]))]
            axes.plot(x, run["curve"], label=arm, linewidth=1.2)
        axes.set_title(f"{name}: {STREAMS[name].summary}", loc="left", fontsize=10)
        axes.set_ylabel("accuracy")
        _canvas.despine(axes)
    every[-1].set_xlabel("examples")
    handles = every[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, loc="outside right upper")
    _canvas.finish(figure, path)

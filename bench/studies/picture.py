"""Pictures of an experiment: data first, drawn by matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_ops._files import write_text

KINDS = ("lines", "points", "intervals", "bars", "heatmap")
# Okabe and Ito's colors, told apart by everybody; the yellow is too pale for lines.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999", "#222222")


# Characters of a legend's label beside the axes, and of a line of a title.
LONGEST_LABEL = 28
LINE = 84


def write_svg(figure: Any, path: Path, **metadata: str) -> None:
    """Writes a figure without the date, and without the spaces at the ends of lines."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, **metadata})
    write_text(path, "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n")


@dataclass(frozen=True)
class Picture:
    """One pair of axes.

    Attributes:
        name: of the file, behind the system's.
        title: what is seen, in a sentence.
        xlabel, ylabel: the axes, with units.
        kind: "lines", "points", "intervals", "bars" or "heatmap".
        series: label -> {"x": [...], "y": [...]} and, for lines and bars, "error": one standard
            error for each y; of intervals it is half of the interval's width, and "bound" has the
            bound of each y, drawn as a dashed line. x of bars and intervals are names, those of
            bars the same for all series. A heatmap has one series, {"x": names of columns, "y":
            names of rows, "z": rows of numbers}.
    """

    name: str
    title: str
    xlabel: str
    ylabel: str
    kind: str
    series: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Picture: kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if not self.series:
            raise ValueError(f"Picture: {self.name} must have a series, got none.")
        for label, data in self.series.items():
            rows = data["z"] if self.kind == "heatmap" else data["x"]
            if len(rows) != len(data["y"]):
                raise ValueError(
                    f"Picture: {self.name}, {label!r}: x (of a heatmap z) and y must be equally "
                    f"long, got {len(rows)} and {len(data['y'])}."
                )

    def draw(self, path: Path) -> None:
        """Writes an SVG whose bytes depend on the data and on matplotlib alone."""
        from moe_ops.viz._canvas import import_matplotlib

        import_matplotlib()
        import matplotlib

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            write_svg(self.figure(), path)

    def figure(self) -> Any:
        """Returns the matplotlib figure."""
        from matplotlib.figure import Figure

        # A legend of long labels is below the axes: beside them it would leave no width.
        labels = list(self.series) if self.kind != "heatmap" and len(self.series) > 1 else []
        below = max(map(len, labels), default=0) > LONGEST_LABEL
        height = 3.8 + 0.18 * len(labels) * below
        figure = Figure(figsize=(7.2, height), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        getattr(self, f"_{self.kind}")(figure, axes)
        axes.set_title(textwrap.fill(self.title, LINE), loc="left", fontsize=10)
        axes.set_xlabel(self.xlabel)
        axes.set_ylabel(self.ylabel)
        if below:
            figure.legend(frameon=False, fontsize=8, loc="outside lower left")
        elif labels:
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def _lines(self, figure: Any, axes: Any) -> None:
        for i, (label, data) in enumerate(self.series.items()):
            color = _COLORS[i % len(_COLORS)]
            mark = "o" if len(data["x"]) <= 20 else None
            axes.plot(data["x"], data["y"], color=color, label=label, marker=mark, markersize=4)
            if "error" in data:
                low = [y - e for y, e in zip(data["y"], data["error"], strict=True)]
                high = [y + e for y, e in zip(data["y"], data["error"], strict=True)]
                axes.fill_between(data["x"], low, high, color=color, alpha=0.2, linewidth=0)

    def _points(self, figure: Any, axes: Any) -> None:
        for i, (label, data) in enumerate(self.series.items()):
            axes.scatter(data["x"], data["y"], s=10, color=_COLORS[i % len(_COLORS)], label=label)

    def _intervals(self, figure: Any, axes: Any) -> None:
        """Beside each other, and not joined: what the names stand for need not have an order."""
        names = list(dict.fromkeys(name for data in self.series.values() for name in data["x"]))
        step = 0.5 / len(self.series)
        for i, (label, data) in enumerate(self.series.items()):
            offset = (i - (len(self.series) - 1) / 2) * step
            places = [names.index(name) + offset for name in data["x"]]
            color = _COLORS[i % len(_COLORS)]
            axes.errorbar(
                places, data["y"], data["error"], fmt="o", color=color, label=label, capsize=3
            )
            for place, bound in zip(places, data.get("bound", []), strict=False):
                axes.hlines(bound, place - step / 2, place + step / 2, color=color, linestyle="--")
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        axes.set_xlim(-0.5, len(names) - 0.5)
        self._name_columns(axes, names)

    def _name_columns(self, axes: Any, names: Sequence[str]) -> None:
        """Upright where there is room, else slanting."""
        long = max(len(str(n)) for n in names) * len(names) > 70
        axes.set_xticks(range(len(names)), names, rotation=25 if long else 0, fontsize=8)
        if long:
            for tick in axes.get_xticklabels():
                tick.set_horizontalalignment("right")

    def _bars(self, figure: Any, axes: Any) -> None:
        names = list(next(iter(self.series.values()))["x"])
        width = 0.8 / len(self.series)
        for i, (label, data) in enumerate(self.series.items()):
            offset = (i - (len(self.series) - 1) / 2) * width
            places = [n + offset for n in range(len(names))]
            color = _COLORS[i % len(_COLORS)]
            axes.bar(places, data["y"], width * 0.95, color=color, label=label)
            if "error" in data:
                axes.errorbar(places, data["y"], data["error"], fmt="none", ecolor="#222222")
        self._name_columns(axes, names)

    def _heatmap(self, figure: Any, axes: Any) -> None:
        (data,) = self.series.values()
        image = axes.imshow(data["z"], cmap="cividis", aspect="auto")
        self._name_columns(axes, data["x"])
        axes.set_yticks(range(len(data["y"])), data["y"], fontsize=8)
        figure.colorbar(image, ax=axes)

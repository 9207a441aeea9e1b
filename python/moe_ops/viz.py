"""Pictures of mixture-of-experts models: loss, expert load, which expert takes which token, what
the experts of a trained model do, and plans of expert parallelism.

Every function returns a matplotlib Figure and, given `path`, also saves it. They draw on the Agg
canvas without pyplot: no window, no global state. Needs matplotlib:
``pip install "torch-moe-ops[viz]"``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_ops import _files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MissingMatplotlibError",
    "expert_colors",
    "plot_expert_load",
    "plot_expert_scores",
    "plot_largest_outputs",
    "plot_loss",
    "plot_plan",
    "plot_token_experts",
]

# Okabe and Ito's palette, which stays distinct under the common forms of colour blindness; black is
# replaced by grey, since the colours lie behind text.
_PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_INK = "#222222"
_GRID = "#DDDDDD"
# Places of notes at the right edge: x in parts of the axes, y in the data.
_AT_EDGE: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "color": _INK}
_IN_DATA: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "color": _INK}


class MissingMatplotlibError(ImportError):
    """matplotlib is not installed."""


def plot_loss(
    train: Sequence[float],
    heldout: Mapping[int, float] | None = None,
    *,
    baselines: Mapping[str, float] | None = None,
    unit: str = "bits/byte",
    title: str = "Loss",
    path: str | Path | None = None,
) -> Figure:
    """Training loss by step, held-out loss, and horizontal lines to beat.

    train: one value a step, from step 1 on; NaN where there is none. A thin line shows the values
    and a thick one their moving average. heldout: step -> loss. baselines: label ->
    loss, in the order in which they are drawn.
    """
    figure = _figure(8.0, 4.8)
    axes = figure.add_subplot()
    values = np.asarray(train, dtype=np.float64)
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=_PALETTE[0], linewidth=0.7, alpha=0.55)
    axes.plot(
        steps,
        _moving_average(values),
        color=_PALETTE[4],
        linewidth=2.0,
        label="training, smoothed",
    )
    if heldout:
        points = sorted(heldout.items())
        axes.plot(
            [step for step, _ in points],
            [loss for _, loss in points],
            color=_PALETTE[5],
            linewidth=1.6,
            marker="o",
            markersize=4.5,
            label="held-out files",
        )
        last_step, last_loss = points[-1]
        style = {"color": _PALETTE[5], "va": "center", "fontweight": "bold"}
        _annotate(axes, f"{last_loss:.2f}", (last_step, last_loss), (6, 0), **style)
    for index, (label, value) in enumerate((baselines or {}).items()):
        axes.axhline(value, color=_INK, linewidth=1.2, linestyle=("--", ":", "-.")[index % 3])
        text = f"{label} {value:.2f}"
        _annotate(axes, text, (1.0, value), (-4, 3), **_AT_EDGE, ha="right", fontsize=9)
    finite = values[np.isfinite(values)]
    bottom = min([*finite, *(heldout or {}).values(), *(baselines or {}).values()], default=0.0)
    top = max([*finite[:1], *(baselines or {}).values()], default=1.0)
    axes.set_ylim(max(0.0, bottom - 0.08 * (top - bottom)), top + 0.08 * (top - bottom))
    axes.set_xlim(0, max(2, len(values)) * 1.06)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss [{unit}]")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.97))
    _despine(axes)
    return _finish(figure, path)


def plot_expert_load(
    history: Any,
    *,
    steps: Sequence[int] | None = None,
    max_columns: int = 160,
    title: str = "Expert load over training",
    path: str | Path | None = None,
) -> Figure:
    """Heat map of the load of every expert over time, one panel a layer.

    history: tokens per expert, [steps, layers, experts] (or [steps, experts]), array or tensor.
    Drawn is the load over the mean load: 1 is perfect balance, 0 a dead expert. Neighbouring steps
    are averaged so that at most `max_columns` columns remain. The number right of each row is the
    expert's share of all slots over the last tenth. steps: the step of each row of `history`.
    """
    from matplotlib.colors import TwoSlopeNorm

    load = np.asarray(history, dtype=np.float64)
    if load.ndim == 2:
        load = load[:, None, :]
    if load.ndim != 3 or load.shape[0] == 0:
        raise ValueError(
            "plot_expert_load: history must be [steps, layers, experts] with at least one step, "
            f"got shape {tuple(load.shape)}"
        )
    num_steps, num_layers, num_experts = load.shape
    share = load / np.maximum(load.sum(axis=2, keepdims=True), 1.0)
    relative = share * num_experts
    first, last = (steps[0], steps[-1]) if steps is not None else (1, num_steps)
    edges = np.unique(np.linspace(0, num_steps, min(num_steps, max_columns) + 1).astype(int))
    columns = np.add.reduceat(relative, edges[:-1], axis=0) / np.diff(edges)[:, None, None]
    tail = share[-max(1, num_steps // 10) :].mean(axis=0)

    row_height = 0.19 if num_experts <= 16 else 3.0 / num_experts
    panel = max(0.9, row_height * num_experts)
    figure = _figure(9.0, num_layers * (panel + 0.42) + 1.0)
    grid = figure.subplots(num_layers, 1, sharex=True, squeeze=False)[:, 0]
    top = max(2.0, float(np.quantile(columns, 0.995)))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top)
    image: Any = None
    for layer, axes in enumerate(grid):
        image = axes.imshow(
            columns[:, layer].T,
            aspect="auto",
            interpolation="nearest",
            cmap="PuOr_r",
            norm=norm,
            extent=(first - 0.5, last + 0.5, num_experts - 0.5, -0.5),
        )
        max_violation = tail[layer].max() * num_experts - 1
        axes.set_title(
            f"layer {layer}: at the end busiest expert {tail[layer].max():.1%} of all slots, "
            f"idlest {tail[layer].min():.1%} (balanced {1 / num_experts:.1%}), "
            f"MaxVio {max_violation:.2f}",
            loc="left",
            fontsize=9,
        )
        every = max(1, math.ceil(num_experts / 16))
        ticks = range(0, num_experts, every)
        axes.set_yticks(ticks, [str(tick) for tick in ticks], fontsize=7)
        axes.set_ylabel("expert")
        axes.tick_params(length=2)
        if num_experts <= 32:
            for expert in range(num_experts):
                share_text, style = f"{tail[layer, expert]:.1%}", {"va": "center", "fontsize": 7}
                _annotate(axes, share_text, (1.0, expert), (4, 0), **_AT_EDGE, **style)
    grid[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=list(grid), pad=0.015, aspect=40, fraction=0.03)
    bar.set_label("load / mean load (1 = balanced, 0 = idle)")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return _finish(figure, path)


def plot_token_experts(
    text: str | Sequence[str],
    topk_ids: Any,
    *,
    num_experts: int | None = None,
    layer_names: Sequence[str] | None = None,
    columns: int = 64,
    title: str = "Which expert takes which token",
    path: str | Path | None = None,
) -> Figure:
    """The text, each token on the colour of its first expert, underlined by its second.

    text: a string (a token a character) or a sequence of T tokens. topk_ids: [T, K] for one layer
    or [layers, T, K], array or tensor; −1 means no expert. num_experts: by default the largest id
    plus one. Lines break at newlines and after `columns` characters; a newline shows as ``⏎``.
    """
    from matplotlib.patches import Patch, Rectangle

    tokens = list(text)
    ids = np.asarray(topk_ids)
    if ids.ndim == 2:
        ids = ids[None]
    if ids.ndim != 3 or ids.shape[1] != len(tokens):
        raise ValueError(
            "plot_token_experts: topk_ids must be [tokens, K] or [layers, tokens, K] with "
            f"{len(tokens)} tokens, got shape {tuple(np.asarray(topk_ids).shape)}"
        )
    num_layers = ids.shape[0]
    num_experts = num_experts or max(1, int(ids.max(initial=0)) + 1)
    colors = expert_colors(num_experts)
    cells, num_lines, width = _typeset(tokens, columns)

    panels_across = 2 if num_layers > 1 else 1
    panels_down = math.ceil(num_layers / panels_across)
    cell_width, cell_height = 0.098, 0.2
    legend_rows = math.ceil(num_experts / 16)
    figure = _figure(
        panels_across * (width * cell_width + 0.3) + 0.2,
        panels_down * (num_lines * cell_height + 0.4) + 0.75 + 0.25 * legend_rows,
    )
    grid = figure.subplots(panels_down, panels_across, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for layer in range(num_layers):
        axes = grid[layer]
        axes.set_xlim(0, width)
        axes.set_ylim(num_lines, 0)
        names = layer_names or [f"layer {index}" for index in range(num_layers)]
        axes.set_title(names[layer], loc="left", fontsize=10, fontweight="bold")
        for (line, column, shown), chosen in zip(cells, ids[layer], strict=True):
            span = len(shown)
            valid = [int(e) for e in chosen if 0 <= e < num_experts]
            face = colors[valid[0]] if valid else "#FFFFFF"
            axes.add_patch(Rectangle((column, line), span, 0.82, facecolor=face, linewidth=0))
            if len(valid) > 1:
                axes.add_patch(
                    Rectangle(
                        (column, line + 0.82), span, 0.12, facecolor=colors[valid[1]], linewidth=0
                    )
                )
            axes.text(
                column + span / 2,
                line + 0.43,
                shown,
                ha="center",
                va="center_baseline",
                family="monospace",
                fontsize=8.5,
                color=_text_color(face),
            )
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.legend(
        handles=[Patch(facecolor=color, label=f"{e}") for e, color in enumerate(colors)],
        title="expert (cell: first choice, underline: second choice)",
        loc="outside lower left",
        ncols=min(16, num_experts),
        frameon=False,
        handlelength=1.2,
        columnspacing=1.2,
        alignment="left",
        fontsize=9,
        title_fontsize=9,
    )
    return _finish(figure, path)


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
    """A plan of `moe_ops.parallel.plan`: memory of a rank, time of a layer, and other EP sizes.

    memory: bytes by what they are for. available: bytes of a device. passes: seconds by what takes
    them, of "forward" and the like. sizes: (EP size, bytes, seconds of a step) each. chosen: the EP
    size of the plan.
    """
    gib = 2.0**30
    figure = _figure(10.0, 6.4 if sizes else 3.6)
    rows = figure.subplots(3 if sizes else 2, 1, height_ratios=[1, 1.4, 2][: 3 if sizes else 2])
    bars, times = rows[0], rows[1]
    _stack(bars, [("a rank", {name: size / gib for name, size in memory.items()})])
    bars.axvline(available / gib, color=_INK, linewidth=1.4, linestyle="--")
    _annotate(bars, "device", (available / gib, 1.0), (0, 2), ha="center", **_IN_DATA)
    bars.set_xlabel("memory, GiB")
    _stack(
        times, [(name, {k: v * 1e3 for k, v in parts.items()}) for name, parts in passes.items()]
    )
    times.set_xlabel("a layer with experts, ms, one after another")
    if sizes:
        axes, labels = rows[2], [str(ep) for ep, _, _ in sizes]
        colors = [_PALETTE[5 if ep == chosen else 7] for ep, _, _ in sizes]
        axes.bar(labels, [size / gib for _, size, _ in sizes], color=colors)
        axes.axhline(available / gib, color=_INK, linewidth=1.2, linestyle="--")
        axes.set_xlabel("EP size")
        axes.set_ylabel("memory, GiB")
        steps = axes.twinx()
        steps.plot(labels, [step for _, _, step in sizes], color=_PALETTE[4], marker="o")
        steps.set_ylabel("step, s", color=_PALETTE[4])
        steps.set_ylim(bottom=0)
        steps.spines["top"].set_visible(False)
        axes.spines["top"].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return _finish(figure, path)


def _stack(axes: Any, bars: list[tuple[str, dict[str, float]]]) -> None:
    """Horizontal bars of parts one behind the other, the first on top, with their names."""
    names = list(dict.fromkeys(name for _, parts in bars for name, size in parts.items() if size))
    left = np.zeros(len(bars))
    labels = [label for label, _ in bars]
    for index, name in enumerate(names):
        widths = np.array([parts.get(name, 0.0) for _, parts in bars])
        color = _PALETTE[index % len(_PALETTE)]
        axes.barh(labels, widths, left=left, color=color, label=name, height=0.6)
        left += widths
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _despine(axes)


def plot_expert_scores(
    panels: Mapping[str, Sequence[Any]],
    *,
    layer_names: Sequence[str] | None = None,
    title: str = "Experts by layer",
    path: str | Path | None = None,
) -> Figure:
    """Heat maps of one number an expert, layers below each other, one panel a kind of number.

    panels: label -> [experts] of each layer, arrays or tensors; layers may differ in their number
    of experts, and NaN stands for none. Each panel has a scale of its own, from 0 (or its least
    number) to its largest.
    """
    if not panels or not all(len(rows) for rows in panels.values()):
        raise ValueError(
            f"plot_expert_scores: panels must hold a layer each, got {list(panels) or 'none'}"
        )
    num_layers = max(len(rows) for rows in panels.values())
    width = max(len(row) for rows in panels.values() for row in rows)
    figure = _figure(4.6 * len(panels) + 0.8, max(2.0, 0.28 * num_layers + 1.3))
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
        axes.tick_params(length=2)
        figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    names = layer_names or [f"layer {index}" for index in range(num_layers)]
    every = max(1, math.ceil(num_layers / 32))
    ticks = range(0, num_layers, every)
    grid[0].set_yticks(ticks, [names[tick] for tick in ticks], fontsize=7)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return _finish(figure, path)


def plot_largest_outputs(
    largest: Sequence[Any],
    *,
    threshold: float | None = None,
    marked: Iterable[tuple[int, int]] = (),
    title: str = "Largest output of each expert",
    path: str | Path | None = None,
) -> Figure:
    """A dot an expert: its largest output over a text by layer, on a logarithmic scale.

    largest: [experts] of each layer; experts without output (0) are left out. threshold: a line.
    marked: (layer, expert) to name.
    """
    if not len(largest):
        raise ValueError("plot_largest_outputs: largest must hold a layer, got none")
    named = set(marked)
    figure = _figure(max(6.0, 0.28 * len(largest) + 3.0), 4.2)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for layer, row in enumerate(largest):
        values = np.asarray(row, dtype=np.float64)
        here = sorted(expert for index, expert in named if index == layer)
        plain = [e for e, value in enumerate(values) if value > 0 and e not in here]
        axes.plot([layer] * len(plain), values[plain], "o", color=_PALETTE[7], markersize=3)
        axes.plot([layer] * len(here), values[here], "o", color=_PALETTE[5], markersize=6)
        for expert in here:
            _annotate(axes, f"expert {expert}", (layer, values[expert]), (6, 0), va="center")
    if threshold is not None and threshold > 0:
        axes.axhline(threshold, color=_INK, linewidth=1.0, linestyle="--")
        style = {"ha": "right", "fontsize": 8}
        _annotate(
            axes, f"threshold {threshold:.3g}", (1.0, threshold), (-4, 3), **_AT_EDGE, **style
        )
    axes.set_xlabel("routed layer")
    axes.set_ylabel("max |output|")
    axes.set_xlim(-0.7, len(largest) + 0.3)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    _despine(axes)
    return _finish(figure, path)


def expert_colors(num_experts: int) -> list[str]:
    """A colour an expert: eight colour-blind-safe hues, then the same hues lighter and darker.

    Beyond 24 experts colours repeat.
    """
    import_matplotlib()
    from matplotlib.colors import to_hex, to_rgb

    white, black = np.ones(3), np.zeros(3)
    families = [(white, 0.0), (white, 0.6), (black, 0.5)]
    colors = []
    for expert in range(num_experts):
        target, amount = families[expert // len(_PALETTE) % len(families)]
        base = np.asarray(to_rgb(_PALETTE[expert % len(_PALETTE)]))
        red, green, blue = base * (1 - amount) + target * amount
        colors.append(to_hex((red, green, blue)))
    return colors


def import_matplotlib() -> None:
    """Raise MissingMatplotlibError with one sentence when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingMatplotlibError(
            'moe_ops.viz needs matplotlib: pip install "torch-moe-ops[viz]"'
        ) from error


def _figure(width: float, height: float) -> Figure:
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        path = Path(path)
        if not path.suffix:  # As matplotlib does.
            path = path.with_name(f"{path.name}.png")
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:], dpi=150)
        _files.write_file(path, content.getbuffer())
    return figure


def _annotate(
    axes: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any
) -> None:
    """Text that is `offset` points away from a place."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def _despine(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a fortieth of the run, NaN skipped."""
    half = max(1, len(values) // 80)
    smoothed = np.full_like(values, np.nan)
    for index in range(len(values)):
        # At the steep start the window shrinks on both sides, so that it stays centred.
        reach = min(half, index)
        window = values[index - reach : index + reach + 1]
        window = window[np.isfinite(window)]
        if window.size:
            smoothed[index] = window.mean()
    return smoothed


def _typeset(tokens: Sequence[str], columns: int) -> tuple[list[tuple[int, int, str]], int, int]:
    """Line, column and printed form of every token, the number of lines and the widest line."""
    cells = []
    line, column, width = 0, 0, 1
    for token in tokens:
        shown = "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in token) or "·"
        if column and column + len(shown) > columns:
            line, column = line + 1, 0
        cells.append((line, column, shown))
        column += len(shown)
        width = max(width, column)
        if token.endswith("\n"):
            line, column = line + 1, 0
    return cells, max(cell[0] for cell in cells) + 1 if cells else 1, width


def _text_color(background: str) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(background)
    return "#FFFFFF" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.45 else _INK

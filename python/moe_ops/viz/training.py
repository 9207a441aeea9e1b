"""Plots of loss and expert load in training, and of the experts of each token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._canvas import (
    AT_EDGE,
    GRID,
    INK,
    PALETTE,
    annotate,
    despine,
    expert_colors,
    finish,
    new_figure,
    text_color,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_loss(
    train: Sequence[float],
    heldout: Mapping[int, float] | None = None,
    *,
    baselines: Mapping[str, float] | None = None,
    unit: str = "bits/byte",
    title: str = "Loss",
    path: str | Path | None = None,
) -> Figure:
    """Draws training loss by step, held-out loss, and horizontal baselines.

    train: one value per step, from step 1 on; NaN if missing. A thin line shows the values and a
    thick one their moving average.
    heldout: step -> loss.
    baselines: label -> loss, in drawing order.
    """
    figure = new_figure(8.0, 4.8)
    axes = figure.add_subplot()
    values = np.asarray(train, dtype=np.float64)
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=PALETTE[0], linewidth=0.7, alpha=0.55)
    axes.plot(
        steps,
        _moving_average(values),
        color=PALETTE[4],
        linewidth=2.0,
        label="training, smoothed",
    )
    if heldout:
        points = sorted(heldout.items())
        axes.plot(
            [step for step, _ in points],
            [loss for _, loss in points],
            color=PALETTE[5],
            linewidth=1.6,
            marker="o",
            markersize=4.5,
            label="held-out files",
        )
        last_step, last_loss = points[-1]
        style = {"color": PALETTE[5], "va": "center", "fontweight": "bold"}
        annotate(axes, f"{last_loss:.2f}", (last_step, last_loss), (6, 0), **style)
    for index, (label, value) in enumerate((baselines or {}).items()):
        axes.axhline(value, color=INK, linewidth=1.2, linestyle=("--", ":", "-.")[index % 3])
        text = f"{label} {value:.2f}"
        annotate(axes, text, (1.0, value), (-4, 3), **AT_EDGE, ha="right", fontsize=9)
    finite = values[np.isfinite(values)]
    bottom = min([*finite, *(heldout or {}).values(), *(baselines or {}).values()], default=0.0)
    top = max([*finite[:1], *(baselines or {}).values()], default=1.0)
    axes.set_ylim(max(0.0, bottom - 0.08 * (top - bottom)), top + 0.08 * (top - bottom))
    axes.set_xlim(0, max(2, len(values)) * 1.06)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss [{unit}]")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.97))
    despine(axes)
    return finish(figure, path)


def plot_expert_load(
    history: Any,
    *,
    steps: Sequence[int] | None = None,
    max_columns: int = 160,
    title: str = "Expert load over training",
    path: str | Path | None = None,
) -> Figure:
    """Draws a heat map of the load of every expert over time, with one panel per layer.

    history: tokens per expert, [steps, layers, experts] (or [steps, experts]), array or tensor. The
    plot shows the load over the mean load: 1 is perfect balance, 0 a dead expert. Neighboring steps
    are averaged so that at most `max_columns` columns remain. The number right of each row is the
    expert's fraction of all slots over the last tenth.
    steps: the step of each row of `history`.
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
    figure = new_figure(9.0, num_layers * (panel + 0.42) + 1.0)
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
                annotate(axes, share_text, (1.0, expert), (4, 0), **AT_EDGE, **style)
    grid[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=list(grid), pad=0.015, aspect=40, fraction=0.03)
    bar.set_label("load / mean load (1 = balanced, 0 = idle)")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return finish(figure, path)


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
    """Draws the text, with each token on the color of its first expert, underlined by its second.

    text: a string (one token per character) or a sequence of T tokens.
    topk_ids: [T, K] for one layer or [layers, T, K], array or tensor; −1 means no expert.
    num_experts: by default the largest id plus one.
    columns: maximum characters per line; lines also break at newlines, which are shown as ``⏎``.
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
    figure = new_figure(
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
                color=text_color(face),
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
    return finish(figure, path)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Computes a centered moving average over about a fortieth of the run, skipping NaN."""
    half = max(1, len(values) // 80)
    smoothed = np.full_like(values, np.nan)
    for index in range(len(values)):
        # At the steep start the window shrinks on both sides, so that it stays centered.
        reach = min(half, index)
        window = values[index - reach : index + reach + 1]
        window = window[np.isfinite(window)]
        if window.size:
            smoothed[index] = window.mean()
    return smoothed


def _typeset(tokens: Sequence[str], columns: int) -> tuple[list[tuple[int, int, str]], int, int]:
    """Returns line, column and printed form of every token, the number of lines, and the width of
    the widest line."""
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

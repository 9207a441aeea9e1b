"""Grids of images, such as outputs of models and their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._canvas import finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_images(
    columns: Mapping[str, Sequence[Any]],
    *,
    notes: Mapping[str, Sequence[str]] | None = None,
    row_names: Sequence[str] = (),
    title: str = "Images",
    size: float = 1.6,
    path: str | Path | None = None,
) -> Figure:
    """Draws a table of images, with one row per case and one column per kind.

    columns: label -> images [3, H, W], arrays or tensors without gradients, with values in [0, 1];
    other values are clipped.
    notes: label of a column -> a line below each of its images.
    row_names: left of the rows.
    size: side length of an image in inches.
    """
    counts = {len(images) for images in columns.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            "plot_images: columns must hold the same number of images each, at least one, got "
            f"{[len(images) for images in columns.values()]}."
        )
    (num_rows,) = counts
    figure = new_figure(size * len(columns) + 0.3, (size + 0.18) * num_rows + 0.6)
    grid = figure.subplots(num_rows, len(columns), squeeze=False)
    for column, (label, images) in enumerate(columns.items()):
        for row, image in enumerate(images):
            axes = grid[row][column]
            pixels = np.asarray(image, dtype=np.float64).transpose(1, 2, 0)
            axes.imshow(pixels.clip(0, 1), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if row == 0:
                axes.set_title(label, fontsize=8)
            if notes is not None and label in notes:
                axes.set_xlabel(notes[label][row], fontsize=7, labelpad=2)
            if column == 0 and row < len(row_names):
                axes.set_ylabel(row_names[row], fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    return finish(figure, path)

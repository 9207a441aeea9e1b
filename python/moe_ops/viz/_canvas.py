"""Canvas, colors and saving of figures, shared by all plots."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_ops import _files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which is distinct under common forms of color blindness; gray replaces
# black, because the colors are behind text.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
INK = "#222222"
GRID = "#DDDDDD"
# Coordinates of notes at the right edge: x in fractions of the axes, y in data coordinates.
AT_EDGE: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "color": INK}
IN_DATA: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "color": INK}


class MissingMatplotlibError(ImportError):
    """Raised if matplotlib is not installed."""


def import_matplotlib() -> None:
    """Raises MissingMatplotlibError with one sentence if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingMatplotlibError(
            'moe_ops.viz needs matplotlib: pip install "torch-moe-ops[viz]"'
        ) from error


def expert_colors(num_experts: int) -> list[str]:
    """Returns one color per expert: eight color-blind-safe hues, then lighter and darker variants.

    Colors repeat after 24 experts.
    """
    import_matplotlib()
    from matplotlib.colors import to_hex, to_rgb

    white, black = np.ones(3), np.zeros(3)
    families = [(white, 0.0), (white, 0.6), (black, 0.5)]
    colors = []
    for expert in range(num_experts):
        target, amount = families[expert // len(PALETTE) % len(families)]
        base = np.asarray(to_rgb(PALETTE[expert % len(PALETTE)]))
        red, green, blue = base * (1 - amount) + target * amount
        colors.append(to_hex((red, green, blue)))
    return colors


def new_figure(width: float, height: float) -> Figure:
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        path = Path(path)
        if not path.suffix:  # Like matplotlib.
            path = path.with_name(f"{path.name}.png")
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:], dpi=150)
        _files.write_file(path, content.getbuffer())
    return figure


def annotate(
    axes: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any
) -> None:
    """Draws text at an offset, in points, from a position."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def despine(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def text_color(background: str) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(background)
    return "#FFFFFF" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.45 else INK

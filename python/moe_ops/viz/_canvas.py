"""What all pictures share: the canvas, colors and how a figure is saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_ops import _files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays distinct under the common forms of color blindness; black is
# replaced by gray, since the colors lie behind text.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
INK = "#222222"
GRID = "#DDDDDD"
# Places of notes at the right edge: x in parts of the axes, y in the data.
AT_EDGE: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "color": INK}
IN_DATA: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "color": INK}


class MissingMatplotlibError(ImportError):
    """matplotlib is not installed."""


def import_matplotlib() -> None:
    """Raise MissingMatplotlibError with one sentence when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingMatplotlibError(
            'moe_ops.viz needs matplotlib: pip install "torch-moe-ops[viz]"'
        ) from error


def expert_colors(num_experts: int) -> list[str]:
    """A color an expert: eight color-blind-safe hues, then the same hues lighter and darker.

    Beyond 24 experts colors repeat.
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
        if not path.suffix:  # As matplotlib does.
            path = path.with_name(f"{path.name}.png")
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:], dpi=150)
        _files.write_file(path, content.getbuffer())
    return figure


def annotate(
    axes: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any
) -> None:
    """Text that is `offset` points away from a place."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def despine(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def text_color(background: str) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(background)
    return "#FFFFFF" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.45 else INK

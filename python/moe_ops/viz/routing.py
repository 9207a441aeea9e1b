"""Plot of the agreement of an inference engine and a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._canvas import PALETTE, despine, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_ops.hf.routing.agreement import RoutingAgreement


def plot_agreement(agreement: RoutingAgreement, *, path: str | Path | None = None) -> Figure:
    """Draws the shares of choices and tokens that differ in each layer, and the distribution of the
    divergence per token if the agreement has log-probabilities.

    agreement: measures of `moe_ops.hf.replay(..., measure=True)`.
    """
    layers = agreement.as_dict()["layers"]
    kl = agreement.kl
    panels = 1 + bool(len(kl))
    figure = new_figure(5.2 * panels, max(2.4, 0.22 * len(layers) + 1.2))
    grid = figure.subplots(1, panels, squeeze=False)[0]
    for offset, color, measure in ((-0.2, PALETTE[4], "choices"), (0.2, PALETTE[1], "tokens")):
        values = [100 * layer[measure] for layer in layers.values()]
        places = [index + offset for index in range(len(values))]
        grid[0].barh(places, values, 0.38, color=color, label=measure)
    grid[0].set_yticks(range(len(layers)), list(layers), fontsize=7)
    grid[0].invert_yaxis()
    grid[0].set_xlabel("% that differ")
    grid[0].legend(frameon=False)
    if panels > 1:
        grid[1].hist(kl.clamp(min=1e-16).log10().numpy(), bins=40, color=PALETTE[2])
        grid[1].set_xlabel("log10 of KL per token")
        grid[1].set_ylabel("tokens")
    for axes in grid:
        despine(axes)
    return finish(figure, path)

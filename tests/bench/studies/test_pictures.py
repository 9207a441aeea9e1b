"""Pictures of the studies: their axes have room, whatever the labels are."""

from __future__ import annotations

import pytest
from bench.studies import page, registry
from bench.studies.picture import Picture

pytest.importorskip("matplotlib")


def widths(picture):
    """Returns the axes' share of the picture's width, and whether the title fits."""
    figure = picture.figure()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    whole = figure.get_window_extent().width
    title = axes._left_title.get_window_extent()
    return axes.get_window_extent().width / whole, title.x1 <= whole and title.x0 >= 0


@pytest.mark.parametrize("system", registry.NAMES)
def test_axes_take_half_of_the_width(system):
    found = registry.experiment(system)
    for picture in page.body(found)[1]:
        share, fits = widths(picture)
        assert share >= 0.5, f"{system}-{picture.name}: axes of {share:.0%} of the width"
        assert fits, f"{system}-{picture.name}: the title is cut"


def test_bounds_are_drawn():
    """A dashed line at the bound of each study, also if it is far from all intervals."""
    data = {"x": ["a", "b"], "y": [1.0, 1.1], "error": [0.1, 0.1], "bound": [-3.0, -3.0]}
    axes = Picture("p", "t", "", "", "intervals", {"one": data}).figure().axes[0]
    assert axes.get_ylim()[0] < -3
    lines = [line for c in axes.collections for line in c.get_segments() if c.get_linestyle()]
    assert sum(segment[0][1] == -3.0 for segment in lines) == 2

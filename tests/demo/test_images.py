"""Images beside each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_ops import viz

pytest.importorskip("matplotlib", reason="pip install torch-moe-ops[viz]")


def test_plot_images(tmp_path):
    red = torch.zeros(3, 4, 4)
    red[0] = 1.5  # Clipped.
    columns = {"a": [red, red], "b": [np.ones((3, 2, 6)), red]}
    figure = viz.plot_images(
        columns, notes={"b": ["10 dB", "20 dB"]}, row_names=["one", "two"], path=tmp_path / "i.png"
    )
    assert (tmp_path / "i.png").stat().st_size > 1000
    axes = figure.axes
    assert [a.get_title() for a in axes] == ["a", "b", "", ""]
    assert [a.get_xlabel() for a in axes] == ["", "10 dB", "", "20 dB"]
    assert [a.get_ylabel() for a in axes] == ["one", "", "two", ""]
    shown = axes[0].images[0].get_array()
    assert shown.shape == (4, 4, 3) and np.array_equal(shown[0, 0], [1, 0, 0])
    for bad in ({"a": [red], "b": []}, {"a": []}, {}):
        with pytest.raises(ValueError, match="same number of images each, at least one"):
            viz.plot_images(bad)

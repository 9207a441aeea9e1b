"""A composition's router and map, by hand-written cases."""

from __future__ import annotations

import pytest
import torch

from moe_ops import zoo


def small_composition():
    composition = zoo.create_model(
        "composition",
        categories=("x", "y"),
        models=("a", "b", "c"),
        sizes=(2, 2, 3),
        generalist="c",
        embedding_size=2,
    )
    with torch.no_grad():
        composition.router.classifier.weight.copy_(torch.eye(2))
        composition.router.classifier.bias.zero_()
    return composition


def test_routing():
    composition = small_composition()
    points = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.1, 0.0], [0.0, 0.1]])
    assert composition.route(points).models.tolist() == [2, 2, 2, 2]
    composition.model_of.copy_(torch.tensor([0, 1]))
    assert composition.route(points).models.tolist() == [0, 1, 0, 1]
    composition.threshold.fill_(0.6)
    routed = composition(points)
    assert routed.models.tolist() == [0, 1, 2, 2] and routed.categories.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(routed.confidence, points.softmax(-1).amax(-1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": (1,)}, "sizes must be 4"),
        ({"generalist": "nobody"}, "generalist must be one of"),
        ({"categories": ()}, "one or more"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ValueError, match=words):
        zoo.create_model("composition", **change)

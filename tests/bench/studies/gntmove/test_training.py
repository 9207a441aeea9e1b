"""Tests of what is measured, and of training that is cut and gone on with."""

from __future__ import annotations

import math

import pytest
import torch
from bench.studies.gntmove.training import draw_unseen, evaluate, routing_of

from moe_ops import zoo
from moe_ops.layers import Routing
from moe_ops.zoo.gntmove.layers import ViewRouted
from moe_ops.zoo.gntmove.model import Rendered

SMALL = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "features": 2, "num_freqs": 1,
         "num_points": 2}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_evaluate():
    data = draw_unseen(3, generator(), views=2, size=12)
    torch.manual_seed(0)
    model = zoo.create_model("gntmove", **SMALL)
    found = evaluate(model, data, progress=False)
    materials = [found[f"psnr {name}"] for name in ("diffuse", "glossy", "textured")]
    assert found["psnr"] == pytest.approx(sum(materials) / 3)
    assert 0 <= found["neighbour agreement"] <= 1 and found["neighbour divergence"] >= 0
    assert 1 <= found["effective experts"] <= 4.001 and found["entropy"] <= math.log(4) + 1e-6
    assert model.training
    dense = evaluate(zoo.create_model("gntmove", **SMALL, ffn="dense"), data, progress=False)
    assert "entropy" not in dense


def test_routing_of_known_choices(monkeypatch):
    """Experts by material: neighbors agree, and what they tell is all of it."""
    data = draw_unseen(3, generator(), views=1, size=12)
    model = zoo.create_model("gntmove", **{**SMALL, "top_k": 1})
    points = torch.rand(3 * 2 * 4, 2, 3)
    kinds = torch.arange(3).repeat_interleave(2 * 4 * 2)
    logits = 30.0 * torch.nn.functional.one_hot(kinds, 4).float()
    routing = Routing(logits, torch.ones(len(kinds), 1), kinds[:, None].int())
    out = Rendered(torch.zeros(3, 8, 3), points, [ViewRouted(routing, logits, logits.sum())])
    monkeypatch.setattr(type(model), "forward", lambda self, *args, **options: out)
    found = routing_of(model, data, count=4)
    assert found["neighbour agreement"] == 1 and found["neighbour divergence"] < 1e-6
    assert found["information"] == pytest.approx(math.log(3))
    assert found["effective experts"] == pytest.approx(3, abs=1e-4)
    assert found["entropy"] == pytest.approx(0, abs=1e-4)
    # Every other ray goes elsewhere.
    other = torch.where(torch.arange(len(kinds)) // 2 % 2 == 1, 3, kinds)
    moved = routing._replace(topk_ids=other[:, None].int())
    out.routed[0] = ViewRouted(moved, logits, logits.sum())
    assert routing_of(model, data, count=4)["neighbour agreement"] == 0

"""The experiments on routing run from end to end, hardly trained."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bench.studies import routing
from bench.studies.study import Results, Run

RECIPE = dataclasses.replace(
    routing.RECIPE, steps=2, batch=3, length=16, heldout_batches=1, warmup=1
)


@pytest.mark.parametrize("make", routing.STUDIES, ids=lambda make: make.__name__)
def test_study(make, monkeypatch):
    monkeypatch.setattr(routing, "DOMAINS", ("maths",))
    study = make(RECIPE)
    runs = {
        name: {0: json.loads(json.dumps(job(0, Run()), allow_nan=False))}
        for name, job in study.runs.items()
    }
    results = Results(runs, [0])
    for hypothesis in study.hypotheses:
        assert len(hypothesis.of(results)) == 1, hypothesis.statement
    assert study.setting()
    keys = {headline.key for headline in routing.EXPERIMENT.headlines}
    assert {h.key for h in study.hypotheses} & keys


def test_a_block_passed_by_is_the_block_where_all_tokens_are_kept():
    torch.manual_seed(0)
    config = dataclasses.replace(routing.CONFIG, num_layers=2)
    model = routing.Depths(config).train()
    layer = model.layers[1].layer
    layer.capacity = 1.0
    tokens = torch.randint(256, (2, 9))
    x = torch.randn(2, 9, routing.H)
    step = routing.Step(model.rope.rotation(0, 9), None, False)
    with torch.no_grad():
        added = layer.block.block(x, step, 0) - x
        gate = x @ layer.weight[0]
        torch.testing.assert_close(model.layers[1](x, step, 1), x + gate[..., None] * added)
        out = model.loss(tokens)
        assert out.loss > out.cross_entropy  # The predictor's loss.


def test_multiplications_are_equal():
    """A token costs the same multiplications in PEER and in the dense network; Mixture-of-Depths
    trains the longer."""
    peer = routing.Retrieval().peer
    found = peer.query.weight.numel() + peer.num_heads * peer.sub_keys.numel()
    found += 2 * peer.num_heads * peer.top_k * routing.H
    assert found == 3 * routing.H * routing.WIDTH
    study = routing.depths_study()
    assert "797 steps there" in study.setting()["Depths"]

"""The benchmark of offloaded experts at a size whose times mean nothing."""

from __future__ import annotations

import dataclasses

import torch
from bench.offload.__main__ import QUICK, joined, page
from bench.offload.run import make_model, measure, widen

PLAN = dataclasses.replace(QUICK, stores=("cached",))


def test_wider_experts_compute_the_same():
    model = make_model(PLAN)
    tokens = torch.randint(256, (2, 9))
    with torch.no_grad():
        want = model(tokens)
        assert torch.equal(widen(model, 64)(tokens), want)
    assert model.layers[0].mlp.experts.w_down.shape == (8, 32, 64)


def test_measure(tmp_path):
    found = measure(PLAN, tmp_path, say=lambda text: None)
    assert len(found["cells"]) == 7
    for cell in found["cells"]:
        assert cell["tokens_a_second"] > 0 and 0 <= cell["hit_rate"] + cell["late"] <= 1
    plan = dataclasses.asdict(PLAN)
    text = page({"machine": {"cpu": "a processor"}, "when": "now", "plan": plan, **found})
    again = joined({**found, "cells": [{**found["cells"][0], "store": "disk"}]}, found)
    assert len(again["cells"]) == 8
    assert text.count("\n") == 11 and "| 2 | cached | 25% | LRU |" in text

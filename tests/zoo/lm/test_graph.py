"""Decoding with keys and values in memory of a fixed size; tests/cuda_torch captures it."""

from __future__ import annotations

import pytest
import torch

from moe_ops.zoo.lm.graph import DecodingGraph

from .common import tokens_of
from .test_optimize import build


@pytest.mark.parametrize("name", ["topp", "deepseek", "coe", "llama", "widenet"])
def test_the_same_tokens(name):
    model = build(name)
    graph = DecodingGraph(model, 2, 14)
    for length in (6, 3):  # The second prompt after a longer sequence.
        prompt = tokens_of(model, 2, length)
        want = model.generate(prompt, 8)
        assert torch.equal(model.generate(prompt, 8, graph=graph), want)


def test_logits_of_steps():
    model = build("deepseek")
    tokens, graph = tokens_of(model, 1, 7), DecodingGraph(model, 1, 7)
    with torch.no_grad():
        want = model(tokens)[0]
    got = [graph.start(tokens[:, :4])[0]]
    got += [graph.step(tokens[:, i : i + 1])[0] for i in range(4, 7)]
    torch.testing.assert_close(torch.stack(got), want[3:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="max_tokens must be at least 8, the tokens of"):
        graph.step(tokens[:, :1])


def test_bad_calls():
    model = build("topp")
    graph = DecodingGraph(model, 2, 4)
    with pytest.raises(ValueError, match="step must follow start"):
        graph.step(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tokens must be \[2, S\], got shape \[1, 3\]"):
        graph.start(tokens_of(model, 1, 3))
    with pytest.raises(ValueError, match="max_tokens must be at least 5"):
        graph.start(tokens_of(model, 2, 5))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DecodingGraph(model, 0, 4)
    with pytest.raises(ValueError, match="attention that takes a mask, got AttentionExperts"):
        DecodingGraph(build("jetmoe"), 1, 4)

"""The zoo's language models under CUDA graphs: a token is one replay."""

from __future__ import annotations

import re

import pytest
import torch
from tests.zoo.lm.common import sharpen, tokens_of

from moe_ops import zoo
from moe_ops.zoo.lm.graph import DecodingGraph

MODELS = pytest.mark.parametrize("name", ["topp", "deepseek"])


def build(name):
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = sharpen(zoo.create_model(name, preset="tiny")).eval()
    return model.cuda()


@MODELS
def test_tokens_of_replays(name):
    model = build(name)
    graph = DecodingGraph(model, 2, 14)
    for length in (6, 3):
        prompt = tokens_of(model, 2, length).cuda()
        want = model.generate(prompt, 8)
        assert torch.equal(model.generate(prompt, 8, graph=graph), want)


@MODELS
def test_one_replay_a_token(name, verbose, capfd, monkeypatch):
    """No kernel of a step is launched but by its replay, which has those of a step without one."""

    def launches():
        lines = capfd.readouterr().err.splitlines()
        return sum(re.match(r"ptxsim: \S+ grid \(", line) is not None for line in lines)

    model = build(name)
    prompt = tokens_of(model, 1, 3).cuda()
    cache = model.new_cache()
    with torch.no_grad():
        model(prompt, cache=cache)
        launches()
        model(prompt[:, :1], cache=cache)
    step = launches()
    assert step >= len(model.layers)

    replays, replay = [], torch.cuda.CUDAGraph.replay

    def count(graph):
        outside = launches()
        replay(graph)
        torch.cuda.synchronize()
        replays.append((outside, launches()))

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    graph = DecodingGraph(model, 1, 8)
    graph.start(prompt)
    launches()
    for _ in range(3):
        graph.step(prompt[:, :1])
    assert replays == [(0, step)] * 3
    assert launches() == 0

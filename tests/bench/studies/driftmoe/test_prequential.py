"""Prequential evaluation, streams, and the command."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from bench.studies.driftmoe import prequential, streams, training
from bench.studies.driftmoe.random_router import RandomRouter
from tests.zoo.driftmoe.test_model import SMALL, Counts, examples

from moe_ops.zoo.driftmoe import DriftMoE


class Constant:
    def __init__(self, label):
        self.label, self.learned = label, []

    def predict_one(self, x):
        return self.label

    def learn_one(self, x, y):
        self.learned.append((x, y))


class Third:
    """A detector that sees a drift at every third error."""

    errors, drift_detected = 0, False

    def update(self, error):
        self.errors += error
        self.drift_detected = bool(error) and self.errors % 3 == 0


def test_random_routing_uses_all_experts_and_trains_no_router():
    chance = RandomRouter(SMALL, lambda i: Counts())
    before = chance.network.router.weight.detach().clone()
    used = Counter(int(chance.observe(x, y).topk_ids[0]) for x, y in examples(200))
    assert len(used) == 4 and min(used.values()) > 25
    assert torch.equal(before, chance.network.router.weight)


def test_prequential():
    stream = [(i, y) for i, y in enumerate("abaabbab")]
    model = Constant("a")
    found = prequential.prequential(
        model, stream, window=3, delay=2, detector=Third(), progress=False
    )
    assert found.hits == [y == "a" for _, y in stream]
    assert found.curve == [2 / 3, 1 / 3]
    assert model.learned == stream[:6]
    assert found.detected == [5]
    # Majority: nothing, a, a or b (a came first), a, a, a, b has 3 of 6 (a came first), a.
    majority = [False, False, True, True, False, False, True, False]
    assert prequential.kappa_m(found.hits, found.labels) == pytest.approx(
        (0.5 - sum(majority) / 8) / (1 - sum(majority) / 8)
    )
    assert prequential.kappa_temporal(found.hits, found.labels) == pytest.approx(
        (0.5 - 2 / 8) / (1 - 2 / 8)
    )
    assert prequential.around(found.hits, [3, 6], 2) == ((0.5 + 0.0) / 2, (0.5 + 0.5) / 2)
    json.dumps(found.numbers([3]), allow_nan=False)
    with pytest.raises(ValueError, match="must have an example"):
        prequential.prequential(model, [], progress=False)
    with pytest.raises(ValueError, match=r"in \[1, 7\], got 8"):
        prequential.around(found.hits, [8], 2)


def test_prequential_of_experts():
    model = DriftMoE(SMALL, lambda i: Counts())
    found = prequential.prequential(model, examples(200), window=50, progress=False)
    again = DriftMoE(SMALL, lambda i: Counts())
    steps = [(again.observe(x, y), y) for x, y in examples(200)]
    assert found.accuracy == sum(step.label == y for step, y in steps) / 200
    assert found.oracle == sum(bool(step.right.any()) for step, _ in steps) / 200
    assert found.any_expert < found.accuracy + 0.05 <= found.oracle + 0.05
    used = Counter(int(step.topk_ids[0]) for step, _ in steps)
    entropy = -sum(n / 200 * math.log(n / 200) for n in used.values())
    assert found.effective_experts == pytest.approx(math.exp(entropy))


def test_switching():
    concepts = [iter([(name, i) for i in range(1000)]) for name in "xyz"]
    got = "".join(x for x, _ in streams.switching(concepts, [3, 5], 9))
    assert got == "xxxyyzzzz"
    concepts = [iter([(name, i) for i in range(4000)]) for name in "xy"]
    got = [x for x, _ in streams.switching(concepts, [2000], 4000, width=400, seed=1)]
    early, middle, late = got[:1500].count("y"), got[1900:2100].count("y"), got[2500:].count("x")
    assert early < 15 and late < 15 and 60 < middle < 140
    with pytest.raises(ValueError, match="1 in ascending order"):
        next(streams.switching([iter([]), iter([])], [], 3))


def test_streams_and_command(tmp_path, capsys):
    pytest.importorskip("river")
    from bench.studies.train import main

    for name, stream in streams.STREAMS.items():
        rows = list(stream.examples(30, seed=1))
        assert rows == list(stream.examples(30, seed=1)), name
        assert len(rows) == 30 and all(len(x) == stream.num_features for x, _ in rows)
    options = ["driftmoe", "--folder", str(tmp_path), "--quiet", "--samples", "60",
               "--window", "20", "--streams", "sea_a", "--forest", "1"]  # fmt: skip
    main([*options, "--arms", "moe_data", "moe_task_vote"])
    done = (tmp_path / "sea_a-moe_data.json").read_text()
    main([*options, "--arms", "moe_data", "tree", "adaptive_forest"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["streams"]["sea_a"]["drifts"] == [15, 30, 45]
    assert list(report["streams"]["sea_a"]["arms"]) == ["moe_data", "tree", "adaptive_forest"]
    assert (tmp_path / "sea_a-moe_data.json").read_text() == done
    assert "moe_task_vote" in capsys.readouterr().out
    with pytest.raises(ValueError, match="runs of these settings"):
        training.train(tmp_path, training.Settings(samples=70), progress=False)

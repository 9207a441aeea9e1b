"""DriftMoE against a plain loop with the same experts; the labels of its router.

Experts that count stand in for river's trees, so that most of this runs without river.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections import Counter

import pytest
import torch
from torch import nn

from moe_ops import surgery, zoo
from moe_ops.zoo.driftmoe import DriftMoE, DriftMoEConfig, cooperative_labels
from moe_ops.zoo.driftmoe.experts import hoeffding_tree
from moe_ops.zoo.driftmoe.model import RunningScale

NAMES, CLASSES = ("a", "b", "c"), ("red", "green", "blue")
SMALL = DriftMoEConfig(
    num_features=3, num_classes=3, num_experts=4, top_k=2, hidden_sizes=(8, 5), dropout=0.0,
    batch_size=4, rate=0.05,
)  # fmt: skip


class Counts:
    """Frequencies of the classes for each sign of the first feature; an expert for tests."""

    def __init__(self):
        self.of = {True: Counter(), False: Counter()}

    def predict_proba_one(self, x):
        counts = self.of[x["a"] > 0]
        total = sum(counts.values())
        return {label: n / total for label, n in counts.items()}

    def learn_one(self, x, y):
        self.of[x["a"] > 0][y] += 1


def examples(count, seed=0):
    draw = random.Random(seed)
    for _ in range(count):
        x = {name: draw.gauss(0, 1) for name in NAMES}
        yield x, CLASSES[(x["a"] > 0) + (x["b"] > 1)]


def trees(i):
    pytest.importorskip("river")
    return hoeffding_tree(grace_period=10)


def plain_loop(model, make_expert, config, stream):
    """Computes the same by the paper's text: a network, Adam, a list of experts."""
    experts = [make_expert(i) for i in range(config.num_experts)]
    (first, _, _), (second, _, _) = (list(model.network.trunk)[i : i + 3] for i in (0, 3))
    head = nn.Linear(5, config.num_experts)
    head.weight.data.copy_(model.network.router.weight)
    head.bias.data.copy_(model.network.router.bias)
    net = nn.Sequential(
        copy.deepcopy(first), nn.ReLU(), copy.deepcopy(second), nn.ReLU(), head
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=config.rate)
    seen, batch, labels, masks, classes = [], [], [], [], []

    def scaled(rows):
        rows = torch.tensor(rows, dtype=torch.float64)
        past = torch.tensor(seen or [[0.0] * 3], dtype=torch.float64)
        std = past.std(0, correction=0)
        mean = past.mean(0) if seen else torch.zeros(3, dtype=torch.float64)
        return ((rows - mean) / torch.where(std == 0, 1.0, std)).float()

    for x, y in stream:
        row = [x[name] for name in NAMES]
        with torch.no_grad():
            order = net(scaled([row]))[0].argsort(descending=True, stable=True).tolist()
        said = experts[order[0]].predict_proba_one(x)
        best = max(((said.get(c, 0.0), -i) for i, c in enumerate(classes)), default=(0, 0))
        labels.append(classes[-best[1]] if best[0] > 0 else None)
        if y not in classes:
            classes.append(y)
        everyone = [e.predict_proba_one(x) for e in experts]

        def likeliest(p):
            top = max((p.get(c, 0.0), -i) for i, c in enumerate(classes))
            return classes[-top[1]] if top[0] > 0 else None

        mask = [float(likeliest(p) == y) for p in everyone]
        if not any(mask):
            mask[max(range(len(mask)), key=lambda e: (everyone[e].get(y, 0.0), -e))] = 1.0
        for e in order[: config.top_k]:
            experts[e].learn_one(x, y)
        seen.append(row)
        batch.append(row)
        masks.append(mask)
        if len(batch) == config.batch_size:
            loss = nn.functional.binary_cross_entropy_with_logits(
                net(scaled(batch)), torch.tensor(masks)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            batch, masks = [], []
    return labels, net


@pytest.mark.parametrize("make_expert", [lambda i: Counts(), trees], ids=["counts", "trees"])
def test_equals_a_plain_loop(make_expert):
    model = DriftMoE(SMALL, make_expert)
    wanted, net = plain_loop(model, make_expert, SMALL, examples(80))
    got = [model.observe(x, y) for x, y in examples(80)]
    assert [step.label for step in got] == wanted
    assert sum(label is not None for label in wanted) > 70
    torch.testing.assert_close(model.network.router.weight, net[-1].weight)
    torch.testing.assert_close(model.network.trunk[0].weight, net[0].weight)


def test_observe_is_predict_and_learn():
    one, two = (DriftMoE(SMALL, lambda i: Counts()) for _ in range(2))
    for x, y in examples(40):
        step = one.observe(x, y)
        assert two.predict_one(x) == step.label
        proba = two.predict_proba_one(x)
        two.learn_one(x, y)
        if step.label is not None:
            assert max(proba, key=proba.get) == step.label
            assert sum(proba.values()) == pytest.approx(1)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [e.of for e in one.experts] == [e.of for e in two.experts]


def test_cooperative_labels():
    p = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    assert cooperative_labels(p, 0).tolist() == [1, 0, 1, 0]  # A tie is of the smaller number.
    assert cooperative_labels(p, 2).tolist() == [0, 1, 0, 0]
    assert cooperative_labels(p, 1).tolist() == [0, 0, 1, 0]  # None is right: the nearest.
    assert cooperative_labels(torch.zeros(2, 3), 0).tolist() == [1, 0]
    with pytest.raises(ValueError, match="C above y = 3"):
        cooperative_labels(p, 3)


def test_task_router_learns_the_class_and_experts_one_each():
    config = DriftMoEConfig(num_features=3, num_classes=3, variant="task", hidden_sizes=(8,),
                            batch_size=1, rate=0.02)  # fmt: skip
    model, vote = (
        DriftMoE(c, lambda i: Counts())
        for c in (config, DriftMoEConfig(**{**vars(config), "prediction": "vote"}))
    )
    hits = 0
    for i, (x, y) in enumerate(examples(300)):
        step = model.observe(x, y)
        hits += i >= 200 and step.label == y
        assert step.right is None
        vote.learn_one(x, y)
    assert hits > 75
    for label, c in model.classes.items():
        counts = model.experts[c].of
        there = sum(y == label for _, y in examples(300))
        assert counts[True][True] + counts[False][True] == there
        assert sum(sum(part.values()) for part in counts.values()) == 300
    x = {"a": 0.5, "b": 0.0, "c": 0.0}
    with torch.no_grad():
        logits = vote.network(torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float64))[0] / 0.8
    scores = {
        label: float(logits.softmax(0)[c]) * vote.experts[c].predict_proba_one(x).get(True, 0.0)
        for label, c in vote.classes.items()
    }
    total = sum(scores.values())
    found = vote.predict_proba_one(x)
    assert found == pytest.approx({k: v / total for k, v in scores.items()}, abs=1e-6)


def test_routing_can_be_another_one():
    model = DriftMoE(SMALL, lambda i: Counts())
    with surgery.override_routing(model, surgery.rules.given([3, 1])):
        step = model.observe({"a": 1.0, "b": 0.0, "c": 0.0}, "red")
    assert step.topk_ids.tolist() == [3, 1]
    assert [bool(e.of[True]) for e in model.experts] == [False, True, False, True]


def test_running_scale_is_that_of_the_past():
    scale = RunningScale(2)
    rows = torch.tensor([[1.0, 5.0], [4.0, 5.0], [-2.0, 5.0]], dtype=torch.float64)
    for row in rows:
        scale.update(row)
    wanted = (rows[:, 0] - rows[:, 0].mean()) / rows[:, 0].std(correction=0)
    torch.testing.assert_close(scale(rows)[:, 0], wanted.float())
    assert torch.equal(scale(rows)[:, 1], torch.zeros(3))


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ({"a": 1.0, "b": 2.0}, "red", "3 features, got 2"),
        ({"a": 1.0, "b": 2.0, "d": 1.0}, "red", "one without 'c'"),
        ({"a": 1.0, "b": math.nan, "c": 1.0}, "red", "finite numbers"),
        ({"a": 1.0, "b": "x", "c": 1.0}, "red", "finite numbers"),
        ({"a": 1.0, "b": 2.0, "c": 1.0}, "black", "at most 3 classes, got 'black'"),
    ],
)
def test_bad_examples(x, y, words):
    model = DriftMoE(SMALL, lambda i: Counts())
    for good, label in zip(examples(3), CLASSES, strict=True):
        model.learn_one(good[0], label)
    with pytest.raises(ValueError, match=words):
        model.learn_one(x, y)


@pytest.mark.parametrize("expert", ["tree", "adaptive_tree"])
def test_a_pickled_model_of_trees_continues_equally(expert):
    pytest.importorskip("river")
    model = zoo.create_model("driftmoe", num_features=3, num_classes=3, expert=expert)
    for x, _ in examples(1500):
        model.learn_one(x, "red" if x["a"] > x["b"] else "blue")
    assert max(tree.n_nodes for tree in model.experts) > 1
    loaded = pickle.loads(pickle.dumps(model))
    for x, y in examples(500, seed=1):
        assert loaded.predict_proba_one(x) == model.predict_proba_one(x)
        loaded.learn_one(x, y)
        model.learn_one(x, y)


def test_registered():
    pytest.importorskip("river")
    model = zoo.create_model("driftmoe", num_features=3, num_classes=3)
    for x, y in examples(5):
        model.learn_one(x, y)
    assert model.predict_one(x) in CLASSES
    adaptive = zoo.create_model("driftmoe", num_features=3, expert="adaptive_tree")
    assert type(adaptive.experts[0]).__name__ == "HoeffdingAdaptiveTreeClassifier"

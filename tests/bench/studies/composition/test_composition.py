"""Router, pool and generation by hand-written cases; training that is cut and gone on with."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from bench.studies import language as fit
from bench.studies import python_texts
from bench.studies.composition import training
from bench.studies.composition.assignment import assign_models
from bench.studies.composition.labels import choose_threshold, propagate_labels
from bench.studies.composition.serving import ExpertPool, generate
from bench.studies.composition.training import fit_router
from tests.zoo.test_composition import small_composition
from torch import nn

from moe_ops.zoo.composition import CategoryRouter


def test_labels_spread_over_a_chain():
    # Two fans of directions: each unlabeled one is nearest to the one before it.
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 3.0, 2.9, 2.8])
    points = torch.stack([angles.cos(), angles.sin()], dim=-1)
    labels = torch.tensor([1, -1, -1, -1, 0, -1, -1])
    assert propagate_labels(points, labels, neighbors=1).tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert labels.tolist() == [1, -1, -1, -1, 0, -1, -1]
    with pytest.raises(ValueError, match="hold a known one"):
        propagate_labels(points, torch.full((7,), -1))


def test_votes_are_weighted_by_likeness():
    angles = torch.tensor([0.0, 0.1, 1.0, 0.9, 1.1])
    points = torch.stack([angles.cos(), angles.sin()], dim=-1)
    labels = torch.tensor([0, -1, 1, 1, 1])
    # The nearest alone says 0; all four say 1 by three votes of cosine 0.5 to 0.7.
    assert propagate_labels(points, labels, neighbors=1)[1] == 0
    assert propagate_labels(points, labels, neighbors=4)[1] == 1


@pytest.mark.parametrize("seed", range(5))
def test_threshold_is_the_best_of_all(seed):
    g = torch.Generator().manual_seed(seed)
    confidence = torch.randint(1, 6, (12,), generator=g) / 6
    routed, generalist = torch.randn(2, 12, generator=g).double()

    def mean_loss(threshold):
        return float(torch.where(confidence < threshold, generalist, routed).mean())

    found = choose_threshold(confidence, routed, generalist)
    best = min(mean_loss(t) for t in [0.0, *confidence.tolist(), 2.0])
    assert mean_loss(found) == pytest.approx(best)
    assert choose_threshold(confidence, routed, routed) == 0.0


def test_router_learns_and_standardizes():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    points = torch.randn(60, 4, generator=g) + 100 + 5 * torch.eye(3, 4)[labels]
    torch.manual_seed(0)
    router = CategoryRouter(4, 3)
    history = fit_router(router, points, labels, steps=60, progress=False)
    assert len(history["loss"]) == 60
    assert (router(points).argmax(-1) == labels).float().mean() > 0.95
    assert CategoryRouter(4, 3, hidden_size=5)(points).shape == (60, 3)


class Named(nn.Module):
    """Adds its number as often as it is asked to."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def generate(self, tokens, num_tokens, offset=0):
        new = torch.full((len(tokens), num_tokens), self.number + offset)
        return torch.cat([tokens, new], dim=1)


def make_pool(capacity, sizes=None, pinned=()):
    sizes = sizes or {"a": 2, "b": 2, "c": 3}
    order = []

    def load(name):
        order.append(name)
        return Named("abcd".index(name))

    return ExpertPool(load, sizes, capacity, pinned=pinned), order


def test_pool_drops_what_was_not_asked_for_the_longest():
    pool, loaded = make_pool(5)
    assert pool.get("a").number == 0 and not pool.get("b").training
    pool.get("a")
    pool.get("c")  # 2 + 2 + 3 are too much: b goes.
    assert pool.resident == ("a", "c") and loaded == ["a", "b", "c"]
    pool.get("b")
    assert pool.resident == ("c", "b")
    assert (pool.counts.hits, pool.counts.loads, pool.counts.evictions) == (1, 4, 2)
    pool.drop("c")
    pool.drop("c")
    assert pool.resident == ("b",) and pool.counts.evictions == 3


def test_pool_keeps_pinned_models_and_their_room():
    pool, _ = make_pool(5, pinned=("c",))
    pool.get("a")
    pool.get("b")  # 2 + 2 would fit, but 3 are kept for c.
    assert pool.resident == ("b",)
    pool.get("c")
    pool.get("a")
    assert pool.resident == ("c", "a")


def test_pool_never_holds_more_than_its_capacity():
    draw = random.Random(0)
    sizes = {"a": 2, "b": 2, "c": 3, "d": 1}
    pool, _ = make_pool(6, sizes, pinned=("d",))
    for _ in range(100):
        name = draw.choice("abcd")
        pool.get(name)
        assert sum(sizes[n] for n in pool.resident) <= 6 and name in pool.resident


def test_bad_pools():
    with pytest.raises(ValueError, match="pinned must be among"):
        make_pool(9, pinned=("e",))
    with pytest.raises(ValueError, match="capacity must hold c beside the pinned models, 5, got 4"):
        make_pool(4, pinned=("a",))
    with pytest.raises(ValueError, match="name must be one of a, b, c, got 'e'"):
        make_pool(9)[0].get("e")


def test_assigned_models():
    pytest.importorskip("scipy")
    composition = small_composition()
    points = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.1, 0.0], [0.0, 0.1]])
    assert composition.route(points).models.tolist() == [2, 2, 2, 2]
    scores = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    found = assign_models(composition, scores, torch.ones(2), budget=7)
    assert found.kept == (0, 1, 2) and found.value == 2
    assert composition.route(points).models.tolist() == [0, 1, 0, 1]
    composition.threshold.fill_(0.6)
    routed = composition(points)
    assert routed.models.tolist() == [0, 1, 2, 2] and routed.categories.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(routed.confidence, points.softmax(-1).amax(-1))
    # With the generalist, 5 hold one specialist: the category of more prompts has it.
    found = assign_models(composition, scores, torch.tensor([1.0, 3.0]), budget=5)
    assert found.models.tolist() == [2, 1]
    again = small_composition()
    again.load_state_dict(composition.state_dict())
    assert again.route(points).models.tolist() == [2, 1, 2, 2]


def test_generate_asks_each_model_once():
    composition = small_composition()
    composition.model_of.copy_(torch.tensor([0, 1]))
    prompts = torch.tensor([[4, 0], [0, 4], [4, 0], [0, 4]])
    pool, loaded = make_pool(3)
    pool.get("b")
    out = generate(composition, prompts, 2, pool, lambda tokens: tokens.float(), offset=10)
    assert out.tolist() == [[4, 0, 10, 10], [0, 4, 11, 11], [4, 0, 10, 10], [0, 4, 11, 11]]
    assert loaded == ["b", "a"] and pool.counts.hits == 1
    none = generate(composition, prompts[:0], 2, pool, lambda tokens: tokens.float())
    assert none.shape == (0, 4)
    with pytest.raises(ValueError, match=r"prompts must be \[B, S\]"):
        generate(composition, prompts[0], 2, pool, lambda tokens: tokens.float())


SETTINGS = training.Settings(
    domains=("digits", "letters", "signs"),
    hidden_size=16,
    num_layers=1,
    steps=12,
    general_steps=12,
    batch_size=2,
    length=16,
    prompts=6,
    prompt_length=8,
    labeled=2,
    router_steps=20,
)


def texts():
    draw = random.Random(0)
    alphabets = {"digits": b"01234567", "letters": b"abcdefgh", "signs": b"+-*/=<>%"}
    return {
        name: python_texts.Text.of(bytes(draw.choices(letters, k=2000)))
        for name, letters in alphabets.items()
    }


def test_another_budget_needs_no_other_models(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    training.train(tmp_path, SETTINGS, texts=texts(), progress=False)
    monkeypatch.setattr(fit, "train_steps", None)  # Nothing is left to train.
    smaller = dataclasses.replace(SETTINGS, budget=2)
    report = training.train(tmp_path, smaller, texts=texts(), progress=False)
    assert len(report["kept"]) <= 2 and "general" in report["kept"]


def test_losses_are_of_what_follows_the_prompt():
    torch.manual_seed(0)
    model = training.dense_model(SETTINGS).eval()
    tokens = torch.randint(256, (2, 12))
    found = training.losses_of(model, training.Prompts(tokens, torch.zeros(2)))
    with torch.no_grad():
        log_p = model(tokens).log_softmax(-1)
    for row in range(2):
        wanted = -sum(log_p[row, i - 1, tokens[row, i]] for i in range(6, 12)) / 6
        torch.testing.assert_close(found[row], wanted)


def test_texts():
    found = python_texts.load()
    assert list(found) == list(python_texts.DOMAINS)
    for text in found.values():
        assert len(text.train) > 8 * len(text.held_out) > 20_000
    rows = found["maths"].spread(3, 10)
    assert rows.shape == (3, 10) and bytes(rows[-1].tolist()) == bytes(
        found["maths"].held_out[-10:].tolist()
    )
    with pytest.raises(ValueError, match=r"names must be among .*, got news"):
        python_texts.load(["news"])

"""The experiment of Mowst: its graphs, what it counts, and that a run depends on the seed alone."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from bench.studies.mowst import arms as mowst_arms
from bench.studies.mowst import claims as mowst
from bench.studies.mowst import data as mowst_data
from bench.studies.mowst.arms import expected_accuracy
from bench.studies.mowst.graphs import Graph
from bench.studies.study import Run
from tests.zoo.mowst.common import N
from tests.zoo.mowst.test_model import random_output

from moe_ops.zoo.mowst import Mowst, MowstOutput

has_geometric = importlib.util.find_spec("torch_geometric") is not None
geometric = pytest.mark.skipif(not has_geometric, reason="PyTorch Geometric is not installed")


@pytest.fixture
def short(monkeypatch):
    settings = {"NODES": 300, "EPOCHS": 3, "ROUNDS": 1, "ONE_BY_ONE": 10}
    for name, value in settings.items():
        monkeypatch.setattr(mowst_arms, name, value)
    monkeypatch.setattr(mowst_arms, "CANDIDATES", (("none", "variance"), ("both", "free")))


def test_neighbors_mislead_about_feature_nodes():
    graph, featured = mowst_data.misleading(2000, generator=torch.Generator().manual_seed(0))
    source, target = graph.edge_index
    same = graph.y[source] == graph.y[target]
    next_one = graph.y[source] == (graph.y[target] + 1) % 4
    # 85 % by design, and a quarter of the rest by chance.
    expected = 0.85 + 0.15 / 4
    assert float(next_one[featured[target]].double().mean()) == pytest.approx(expected, abs=0.02)
    assert float(same[~featured[target]].double().mean()) == pytest.approx(expected, abs=0.02)
    assert bool((source != target).all()) and int(target.bincount().max()) <= 8


def test_films_share_people_and_no_genre_is_read(tmp_path):
    (tmp_path / "ml-100k.inter").write_text(
        "head\n" + "".join(f"{u}\t{f}\t{u % 5 + 1}\t0\n" for f in range(1, 6) for u in range(1, 7))
    )
    people = "".join(f"{u}\t{20 + u}\t{'FM'[u % 2]}\tjob{u % 3}\t0\n" for u in range(1, 7))
    (tmp_path / "ml-100k.user").write_text("head\n" + people)
    genres = ("Drama", "Comedy Drama", "Horror Comedy", "Documentary", "Drama")
    films = "".join(f"{i}\tA Film\t199{i}\t{g}\n" for i, g in enumerate(genres, 1))
    (tmp_path / "ml-100k.item").write_text("head\n" + films)
    (tmp_path / "ml-100k.link").write_text("head\n" + "".join(f"{i}\tm{i}\n" for i in range(1, 5)))
    triples = [
        ("m1", "film.film.actor", "p"),
        ("m3", "film.film.directed_by", "p"),
        ("m4", "film.film.actor", "p"),
        ("m1", "film.film.genre", "g"),
        ("m2", "film.film.genre", "g"),
    ]
    (tmp_path / "ml-100k.kg").write_text("head\n" + "".join("\t".join(t) + "\n" for t in triples))
    x, edge_index, y = mowst_data._films(tmp_path)
    # Film 4 has no class and film 5 no entry in the knowledge graph.
    assert y.tolist() == [6, 5, 1]
    assert edge_index.tolist() == [[0, 2], [2, 0]]
    assert x.shape[0] == 3 and bool(x.isfinite().all())


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="films needs the package recbole"):
        mowst_arms.case_of("films", 10)


def test_flops_are_those_of_the_products_and_sums():
    # 5 rows of 3 to 4 features with 7 edges, then 2 rows of 4 to 2 with 3 edges.
    layers = [(5, 7), (2, 3)]
    assert mowst_arms.flops([3, 4, 2], layers) == 2 * (5 * 12 + 7 * 4 + 2 * 8 + 3 * 2)
    assert mowst_arms.flops([3, 4, 2], layers, "sage") == 2 * (2 * 60 + 7 * 3 + 2 * 16 + 3 * 4)


def test_the_threshold_is_the_lowest_that_costs_nothing():
    # Right by the mixture; by the weak expert alone only where C is at least 0.8.
    c = torch.tensor([0.55, 0.75, 0.85, 0.97])
    weak = torch.tensor([[0.0, 0.1], [0.0, 0.1], [3.0, 0.0], [3.0, 0.0]])
    strong = torch.tensor([[9.0, 0.0]] * 4)
    every, none = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    y, edges = torch.zeros(4, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    graph = Graph(torch.zeros(4, 1), edges, y, none, every, none)
    assert mowst_arms.threshold(MowstOutput(weak, strong, c), graph) == 0.8


@geometric
def test_widened_experts_have_the_parameters_of_both(short):
    case = mowst_arms.case_of("populations", 0)
    target = mowst_arms.size(Mowst(case.config()))
    wide = Mowst(mowst_arms.widened(case, target))
    for expert in (wide.weak, wide.strong):
        assert mowst_arms.size(expert) == pytest.approx(target, rel=0.05)


@geometric
def test_a_run_depends_on_the_seed_alone(short):
    study = next(s for s in mowst.EXPERIMENT.studies if s.name == "mowst-misleading")
    job = study.runs["misleading"]
    runs = {str(seed): {**job(seed, Run()), "seconds": 1.0} for seed in (10, 11)}
    text = json.dumps(runs["10"], allow_nan=False)
    assert text == json.dumps({**job(10, Run()), "seconds": 1.0}, allow_nan=False)
    stored = json.loads(
        json.dumps({"machine": "this", "fixed": study.fixed(), "runs": {"misleading": runs}})
    )
    report = study.report("mowst", stored)
    rows = report.arms["misleading: Mowst*"]
    assert rows[0] != rows[1] and len(report.claims) == len(study.hypotheses)
    for row in rows:
        assert all(0 <= value <= 1 for value in row[:-1])
    assert [p.name for p in report.pictures] == ["confidence", "accuracy"]
    # Ahead of the better of two, by hand.
    best = [max(report.arms[f"misleading: {arm}"][i][0] for arm in mowst.PAIR) for i in (0, 1)]
    claim = next(c for c in report.claims if c.statement.endswith("ahead of MLP and GCN"))
    assert claim.differences == [row[0] - b for row, b in zip(rows, best, strict=True)]


def test_expected_accuracy_is_the_mean_over_draws():
    output, labels = random_output()
    weak, strong = (t.argmax(-1) == labels for t in output[:2])
    draws = torch.rand(20000, N, dtype=torch.float64) < output.confidence
    simulated = torch.where(draws, weak, strong).double().mean()
    exact = expected_accuracy(output, labels, mode="stochastic")
    assert abs(exact - simulated) < 4 * 0.5 / math.sqrt(20000 * N)
    mixed = output.log_probs().argmax(-1) == labels
    assert expected_accuracy(output, labels, mode="mixed") == mixed.double().mean()

"""The experiment of Mowst: its graphs, what it counts, and that a run depends on the seed alone."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from bench.experiments import mowst, mowst_data

from moe_ops.zoo.mowst import Mowst, MowstOutput
from moe_ops.zoo.mowst.graphs import Graph

has_geometric = importlib.util.find_spec("torch_geometric") is not None
geometric = pytest.mark.skipif(not has_geometric, reason="PyTorch Geometric is not installed")


@pytest.fixture
def short(monkeypatch):
    settings = {"NODES": 300, "EPOCHS": 3, "ROUNDS": 1, "ONE_BY_ONE": 10}
    for name, value in settings.items():
        monkeypatch.setattr(mowst, name, value)
    monkeypatch.setattr(mowst, "CANDIDATES", (("none", "variance"), ("both", "free")))
    for name in ("digits", "films"):
        monkeypatch.setattr(mowst, name, lambda seed: None)


def test_digits_are_linked_to_near_ones():
    pytest.importorskip("sklearn")
    graph = mowst_data.digits(0)
    assert graph.x.shape == (1797, 64) and graph.y.bincount().min() > 150
    assert torch.equal(mowst_data.both_ways(graph.edge_index), graph.edge_index)
    assert graph.edge_index[1].bincount().min() >= 8
    assert mowst_data.homophily(graph) > 0.9
    assert not torch.equal(graph.test, mowst_data.digits(1).test)


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


def test_missing_packages_are_named(short, monkeypatch):
    monkeypatch.setattr(mowst, "digits", mowst_data.digits)
    monkeypatch.setattr(mowst, "films", mowst_data.films)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines: list[str] = []
    assert [case.name for case in mowst.cases(0, lines.append)] == ["populations"]
    assert [line.split(" is not installed")[0] for line in lines] == ["scikit-learn", "recbole"]


def test_flops_are_those_of_the_products_and_sums():
    # 5 rows of 3 to 4 features with 7 edges, then 2 rows of 4 to 2 with 3 edges.
    layers = [(5, 7), (2, 3)]
    assert mowst.flops([3, 4, 2], layers) == 2 * (5 * 12 + 7 * 4 + 2 * 8 + 3 * 2)
    assert mowst.flops([3, 4, 2], layers, "sage") == 2 * (2 * 60 + 7 * 3 + 2 * 16 + 3 * 4)


def test_the_threshold_is_the_lowest_that_costs_nothing():
    # Right by the mixture; by the weak expert alone only where C is at least 0.8.
    c = torch.tensor([0.55, 0.75, 0.85, 0.97])
    weak = torch.tensor([[0.0, 0.1], [0.0, 0.1], [3.0, 0.0], [3.0, 0.0]])
    strong = torch.tensor([[9.0, 0.0]] * 4)
    every, none = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    y, edges = torch.zeros(4, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    graph = Graph(torch.zeros(4, 1), edges, y, none, every, none)
    assert mowst.threshold(MowstOutput(weak, strong, c), graph) == 0.8


@geometric
def test_widened_experts_have_the_parameters_of_both(short):
    (case,) = mowst.cases(0, lambda line: None)
    target = mowst.size(Mowst(case.config()))
    wide = Mowst(mowst.widened(case, target))
    for expert in (wide.weak, wide.strong):
        assert mowst.size(expert) == pytest.approx(target, rel=0.05)


@geometric
def test_a_run_depends_on_the_seed_alone(short):
    first, again = (mowst.run([0, 1], lambda line: None) for _ in range(2))
    text = json.dumps(first.to_dict(), allow_nan=False)
    assert text == json.dumps(again.to_dict(), allow_nan=False)
    rows = first.arms["populations: Mowst*"]
    assert rows[0] != rows[1]
    for row in rows:
        assert all(0 <= value <= 1 for value in row[:-1])
    assert [p.name for p in first.pictures] == ["confidence", "accuracy"]
    assert len(first.pictures[1].series) <= 8  # Colours that differ.

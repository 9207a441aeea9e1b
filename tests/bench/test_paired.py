"""The paired benchmark: its cells, its verdicts, two processes of one build."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from bench.paired import __main__ as paired
from bench.paired import cells

import moe_ops
from moe_ops.bench import shapes
from moe_ops.bench.timing import Samples

BUILD = Path(moe_ops.__file__).resolve().parents[1]


def cell(base: list[float], new: list[float]) -> paired.Cell:
    samples = {"base": Samples(dict(enumerate(base))), "new": Samples(dict(enumerate(new)))}
    return paired.Cell(samples)


def test_shapes_are_those_of_the_benchmark():
    for name in ("a32", "c", "d"):
        shape = shapes.SHAPES[name]
        assert cells.SHAPES[name] == (shape.H, shape.I, shape.E, shape.K)


def test_cells_are_chosen_by_words():
    assert len(cells.chosen([])) == len(cells.all_cells()) > 100
    assert cells.chosen(["router", "model training"]) == [
        *(f"router T{T} E{E}" for T, E in ((1, 8), (64, 8), (64, 128), (512, 128))),
        *(f"model training {name}" for name in ("jetmoe", "deepseek", "moduleformer")),
    ]
    for shape in ("a32", "c", "d", "narrow"):
        assert cells.chosen([f"forward {shape} fp32", f"forward {shape} bf16"])


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        ([1.0, 1.0, 1.0], [1.05, 1.04, 1.06], "SLOWER"),
        ([1.0, 1.0, 1.0], [0.9, 0.95, 0.9], "faster"),
        ([1.0, 1.0, 1.0], [1.02, 1.03, 1.01], ""),
        # Another process held the core in two rounds: the best ones are alike.
        ([1.0, 1.0, 1.0], [1.5, 1.5, 1.0], ""),
        # The machine was half as fast in one round, for both.
        ([1.0, 2.0, 1.0], [1.0, 2.0, 1.0], ""),
    ],
)
def test_verdicts(base, new, verdict):
    assert cell(base, new).verdict == verdict


def test_two_processes_of_one_build(monkeypatch, tmp_path, capsys):
    arguments = [str(BUILD), str(BUILD), "--cells", "gated_act,model training deepseek"]
    path = tmp_path / "samples.json"
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--rounds", "2", "--json", str(path)])
    assert paired.main() in (0, 1)  # How fast they are is no matter of this test.
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["round 1 of 2", "round 2 of 2"]
    assert "| gated_act" in shown.out and "| model training deepseek" in shown.out
    assert path.read_text().count("base") == 2


def test_a_cell_leaves_no_traces(monkeypatch):
    traces: list[int] = []

    def job() -> None:
        traces.append(1)

    def broken() -> None:
        raise AttributeError("no such op")

    make = {"a job": lambda: job, "broken": broken, "killed": lambda: lambda: os._exit(3)}
    made = {name: functools.partial(what) for name, what in make.items()}
    monkeypatch.setattr(cells, "all_cells", lambda: made)
    assert float(cells.measure("a job")) > 0 and not traces
    assert cells.measure("broken") == "AttributeError: no such op"
    assert cells.measure("killed") == "ended with 3"


def test_what_cannot_be_compared_gets_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), str(BUILD), "--cells", "gated_act"])
    with pytest.raises(SystemExit, match=rf"bench.paired: {tmp_path} must hold"):
        paired.main()
    monkeypatch.setattr(sys, "argv", ["x", str(BUILD), str(BUILD), "--cells", "no such cell"])
    with pytest.raises(SystemExit, match="must be words of names of cells"):
        paired.main()


class Fake:
    """Stands for the process of a build and keeps the order of calls."""

    calls: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.name = folder.name

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self) -> None:
        pass

    def measure(self, cell: str) -> float | str:
        self.calls.append((cell, self.name))
        return "AttributeError: no such op" if (cell, self.name) == ("b", "old") else 1e3


def test_a_cell_runs_in_both_builds_at_once(monkeypatch):
    monkeypatch.setattr(paired, "Build", Fake)
    folders = {"base": Path("old"), "new": Path("young")}
    found = paired.compare(folders, ["a", "b"], 2, {})
    first = [("a", "old"), ("a", "young"), ("b", "young"), ("b", "old")]
    second = [("a", "young"), ("a", "old"), ("b", "old"), ("b", "young")]
    assert Fake.calls == first + second
    assert found["a"].ratio == 1
    assert found["b"].verdict == "base: AttributeError: no such op"
    assert "–" in paired.render(found)

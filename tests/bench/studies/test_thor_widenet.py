"""The experiments on THOR and WideNet run from end to end, hardly trained."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bench.studies.study import Paused, Results, Run
from bench.studies.thor import claims as thor
from bench.studies.thor import parallel
from bench.studies.training import Recipe, train_drawn
from bench.studies.widenet import claims as widenet

pytest.importorskip("safetensors")

RECIPE = Recipe(steps=3, batch=4, length=16, heldout_batches=1, warmup=1)


def checked(study):
    """One seed of a study; its claims are made of it."""
    runs = {name: {0: json.loads(json.dumps(job(0, Run()), allow_nan=False))}
            for name, job in study.runs.items()}  # fmt: skip
    results = Results(runs, [0])
    for hypothesis in study.hypotheses:
        assert len(hypothesis.of(results)) == 1, hypothesis.statement
    return study.setting(), results


def test_thor(monkeypatch):
    pytest.importorskip("tokenizers")
    numbers = parallel.load("numbers", longest=30, most=40)
    numbers = dataclasses.replace(numbers, valid=numbers.valid[:6], test=numbers.test[:4])
    monkeypatch.setattr(parallel, "load", lambda *a, **k: numbers)
    monkeypatch.setattr(thor, "SIZES", dataclasses.replace(thor.SIZES, hidden_size=16))
    monkeypatch.setattr(thor, "LONGEST", 6)
    monkeypatch.setattr(thor, "DRAWS", 2)
    setting, results = checked(thor.study("thor-toy", "toy", 1, 1.0, RECIPE))
    assert "quran-json" in setting["Data"]
    rows = {arm: found[0] for arm, found in results.arms().items()}
    assert list(rows) == list(thor.ARMS)
    for arm, row in rows.items():
        drawn = arm in ("thor", "random")
        assert (row[thor.LOSS] != row[thor.MEAN]) == drawn == (row[thor.DEVIATION] is not None)
    assert len({row[thor.LOSS] for row in rows.values()}) == 5


def test_widenet_reads(monkeypatch):
    monkeypatch.setattr(widenet, "DOMAINS", ("reference", "maths"))
    sizes = dataclasses.replace(widenet.SIZES, hidden_size=16, num_layers=2, intermediate_size=8)
    monkeypatch.setattr(widenet, "SIZES", sizes)
    setting, results = checked(widenet.text_study("widenet-toy", "toy", 1, 1.0, RECIPE))
    assert "parameters" in setting["WideNet"]
    rows = {arm: found[0] for arm, found in results.arms().items()}
    assert rows["ALBERT"]["kept"] is None and 0 <= rows["WideNet"]["kept"] <= 1
    assert len({row["loss"] for row in rows.values()}) == 4


def test_widenet_sees(monkeypatch):
    sizes = dataclasses.replace(
        widenet.SEEING, hidden_size=16, num_layers=2, intermediate_size=8, image_size=8
    )
    monkeypatch.setattr(widenet, "SEEING", sizes)
    monkeypatch.setattr(widenet, "TESTED", 2)
    _, results = checked(widenet.image_study("widenet-toy", "toy", 1, 1.0, RECIPE))
    assert all(0 < row[0]["error, %"] <= 100 for row in results.arms().values())


def test_training_on_drawn_batches_goes_on(tmp_path):
    """With the bits of a run that was not cut, those of dropout too."""

    def trained(run):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))

        def loss(draw):
            return model(torch.randn(3, 4, generator=draw)).square().mean()

        return train_drawn(model, loss, RECIPE, 0, run), model[0].weight

    class Cut(Run):
        def step(self, done, total, state):
            self.deadline = 0.0 if done == 2 else float("inf")
            super().step(done, total, state)

    losses, weight = trained(Run())
    with pytest.raises(Paused):
        trained(Cut(tmp_path / "run.pt"))
    again, same = trained(Run(tmp_path / "run.pt"))
    assert again == losses and torch.equal(same, weight)

"""The studies of DriftMoE and of the recipes run from end to end, hardly trained."""

from __future__ import annotations

import json

import pytest
import torch
from bench.studies.driftmoe import claims as driftmoe
from bench.studies.recipes import claims as recipes
from bench.studies.recipes import language, setup
from bench.studies.study import Results, Run
from bench.studies.text import load_domains


def checked(study):
    """One seed of a study; its claims are made of it."""
    runs = {
        name: {0: json.loads(json.dumps(job(0, Run()), allow_nan=False))}
        for name, job in study.runs.items()
    }
    results = Results(runs, [0])
    for hypothesis in study.hypotheses:
        assert len(hypothesis.of(results)) == 1, hypothesis.statement
    assert study.setting()
    return results


@pytest.mark.parametrize("study", recipes.EXPERIMENT.studies, ids=lambda study: study.name)
def test_recipes(study, monkeypatch):
    if study in language.STUDIES:
        pytest.importorskip("safetensors")
    monkeypatch.setattr(setup, "SCALE", 0.003)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(800, 64, generator=draw), torch.arange(800) % 10
    monkeypatch.setattr(setup, "_digits", lambda: (x, y))
    if study is language.PROX_PROSE:  # Its text is in an archive that tests do not have.
        monkeypatch.setattr(language, "load_domains", lambda _: load_domains(("reference",)))
    results = checked(study)
    assert len(results.arms()) >= 3


def test_driftmoe(monkeypatch):
    pytest.importorskip("river")
    monkeypatch.setattr(driftmoe, "FOREST", 1)
    monkeypatch.setattr(driftmoe, "POINTS", 4)
    study = driftmoe.study("driftmoe-toy", "sea_a", 1, 1.0, 80, True)
    results = checked(study)
    (picture,) = study.pictures(results)
    assert list(picture.series) == list(driftmoe.EVERY)
    assert len(picture.series["tree"]["y"]) == 4

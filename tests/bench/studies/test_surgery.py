"""The experiments on trained models run from end to end, on models that are hardly trained."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from bench.studies import (
    expertflow,
    on_subject,
    premoe,
    scmoe,
    subject,
    super_experts,
    uncurl,
)
from bench.studies.study import Results, Run
from bench.studies.training import Recipe

pytest.importorskip("safetensors")
pytest.importorskip("scipy")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """Three small layers, two kinds of text that every machine has, little of each."""
    recipe = Recipe(steps=4, batch=4, length=16, heldout_batches=2, warmup=2)
    small = {
        "hidden_size": 32, "num_layers": 3, "num_heads": 2, "head_size": 16, "num_experts": 8,
        "top_k": 2, "intermediate_size": 16,
    }  # fmt: skip
    made = subject.SUBJECTS["subject"]
    config = dataclasses.replace(made.config, **small)
    found = dataclasses.replace(made, config=config, recipe=recipe, domains=("reference", "maths"))
    monkeypatch.setattr(subject, "SUBJECTS", {"subject": found})
    monkeypatch.setenv("MOE_OPS_CACHE", str(tmp_path))
    monkeypatch.setattr(on_subject, "JUDGED", 8)
    monkeypatch.setattr(on_subject, "PROFILED", 8)
    monkeypatch.setattr(premoe, "PROMPTS", 4)
    monkeypatch.setattr(uncurl, "TASKS", ("maths",))
    monkeypatch.setattr(uncurl, "SIZES", (8, 4))
    monkeypatch.setattr(uncurl, "STEPS", 2)
    monkeypatch.setattr(uncurl, "TUNED", 8)
    monkeypatch.setattr(super_experts, "STEPS", 2)
    monkeypatch.setattr(super_experts, "PROFILED", 2)
    for name, value in (("STEPS", 2), ("TRAINED", 4), ("TESTED", 4), ("PROMPT", 4)):
        monkeypatch.setattr(expertflow, name, value)


def checked(study):
    """One seed of a study; its claims and pictures are made of it."""
    (run,) = study.runs
    result = json.loads(json.dumps(study.runs[run](0, Run()), allow_nan=False))
    results = Results({run: {0: result}}, [0])
    assert study.setting()["Model"].startswith("`bench.studies.subject` subject")
    for hypothesis in study.hypotheses:
        assert len(hypothesis.of(results)) == 1, hypothesis.statement
    for picture in study.pictures(results):
        assert picture.series
    return result


def test_premoe():
    result = checked(premoe.EXPERIMENT.studies[0])
    assert len(result["rows"]) == 11
    assert result["rows"]["tcess"]["added, 0.5 kept"] == pytest.approx(
        sum(result["added"]["0.5"]["tcess"].values()) / 2
    )


def test_uncurl():
    result = checked(uncurl.EXPERIMENT.studies[0])
    # With as many groups as experts nothing is merged.
    for arm in ("aligned", "unaligned", "frequency"):
        assert result["rows"][arm]["added, 8 left"] == pytest.approx(0, abs=1e-5)
    scratch = checked(uncurl.EXPERIMENT.studies[1])
    assert list(scratch["rows"]) == ["from scratch", "aligned", "gate_norm"]


def test_super_experts():
    planted = checked(super_experts.EXPERIMENT.studies[0])
    rows = planted["rows"]
    assert rows["layer 0"]["found"] == rows["layer 1"]["found"] == 1.0
    assert all(row["of the threshold"] > 1 for row in (rows["layer 0"], rows["layer 1"]))
    result = checked(super_experts.EXPERIMENT.studies[1])
    assert list(result["damage"]) == [f"layers.{i}.mlp" for i in range(3)]


def test_problems_of_scmoe():
    """Solutions of the test are none of the training's, and the right ones count as solved."""
    train = scmoe.Problems.drawn(200, 0, test=False)
    test = scmoe.Problems.drawn(30, 0, test=True)
    lines = [{bytes(row).decode() for row in p.solutions.tolist()} for p in (train, test)]
    assert not lines[0] & lines[1]
    question = bytes(test.questions[0].tolist()).decode()
    solution = bytes(test.solutions[0][test.counted[0]].tolist()).decode()
    assert question.endswith("? ") and solution.endswith("\n") and "#" in solution
    right = iter(test.batches(scmoe.TOGETHER))

    def generate(questions, *_, **__):
        return torch.cat([questions, next(right).solutions], 1)

    assert scmoe.solved(SimpleNamespace(generate=generate), test) == 1.0


def test_scmoe(monkeypatch):
    recipe = dataclasses.replace(scmoe.RECIPE, steps=2, batch=4)
    for name, value in (("RECIPE", recipe), ("TESTED", 2)):
        monkeypatch.setattr(scmoe, name, value)
    small = {"num_experts": 4, "num_layers": 1, "num_shared_experts": 1}
    config = dataclasses.replace(subject.SUBJECTS["subject"].config, **small)
    result = json.loads(json.dumps(scmoe.whole(config)(0, Run()), allow_nan=False))
    results = Results({scmoe.ALL: {0: result}}, [0])
    for study in scmoe.EXPERIMENT.studies:
        assert all(len(h.of(results)) == 1 for h in study.hypotheses)
        assert study.pictures(results)[0].series
    assert result["rows"][scmoe.alone("rank 2")][scmoe.DIVERGENCE] > 0


def test_expertflow():
    result = checked(expertflow.EXPERIMENT.studies[0])
    rows = result["rows"]
    for column in list(rows["LRU"])[:4]:
        best = rows["optimum, nothing fetched"][column]
        assert all(rows[arm][column] <= best + 1e-9 for arm in ("LRU", "LFU", "FIFO"))
        assert 0 < best <= rows["optimum"][column] <= 1
    assert rows["regrouped by all routes"][expertflow.EXPERTS] > 0

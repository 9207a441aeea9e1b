"""The experiments on models made from dense ones run from end to end, hardly trained."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bench.experiments import bam, factorllm, on_subject, subject
from bench.experiments.study import Results, Run
from bench.experiments.training import Recipe

pytest.importorskip("safetensors")

TEXT = ("reference", "maths")


def checked(study, run=None):
    """One seed of a study; its claims are made of it."""
    (name,) = study.runs
    result = json.loads(json.dumps(study.runs[name](0, run or Run()), allow_nan=False))
    results = Results({name: {0: result}}, [0])
    for hypothesis in study.hypotheses:
        assert len(hypothesis.of(results)) == 1, hypothesis.statement
    assert study.setting()
    return result


def test_bam(monkeypatch):
    monkeypatch.setattr(bam, "SPECIALISTS", ("maths",))
    dense = dataclasses.replace(
        bam.DENSE, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_size=8,
        intermediate_size=16,
    )  # fmt: skip
    recipe = Recipe(steps=3, batch=10, length=16, heldout_batches=1, warmup=1)
    result = checked(bam.study("bam-toy", "toy", 1, 1.0, dense, recipe, recipe, recipe))
    assert list(result["rows"]) == [*bam.ARMS, bam.LONGER, bam.CONTINUED]
    assert result["steps of BTX"] > 3
    assert result["rows"]["BTX"] != result["rows"]["BAM, own K/V"]


def test_bam_goes_on(monkeypatch, tmp_path):
    """Parts that are done are not repeated, and give the same rows."""
    monkeypatch.setattr(bam, "SPECIALISTS", ("maths",))
    dense = dataclasses.replace(
        bam.DENSE, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_size=8,
        intermediate_size=16,
    )  # fmt: skip
    recipe = Recipe(steps=2, batch=10, length=16, heldout_batches=1, warmup=1)
    study = bam.study("bam-toy", "toy", 1, 1.0, dense, recipe, recipe, recipe)
    first = checked(study, Run(tmp_path / "run.pt"))
    assert len(list(tmp_path.glob("run.*.pt"))) == 2 + len(bam.ARMS) + 2
    assert checked(study, Run(tmp_path / "run.pt")) == first == checked(study)


def test_factorllm(monkeypatch, tmp_path):
    recipe = Recipe(steps=4, batch=4, length=16, heldout_batches=2, warmup=2)
    made = subject.SUBJECTS["dense"]
    config = dataclasses.replace(
        made.config, hidden_size=32, num_layers=2, num_dense_layers=2, num_heads=2, head_size=16,
        dense_intermediate_size=32,
    )  # fmt: skip
    found = dataclasses.replace(made, config=config, recipe=recipe, domains=TEXT)
    monkeypatch.setattr(subject, "SUBJECTS", {"dense": found})
    monkeypatch.setenv("MOE_OPS_CACHE", str(tmp_path))
    monkeypatch.setattr(on_subject, "JUDGED", 8)
    monkeypatch.setattr(factorllm, "STEPS", 2)
    monkeypatch.setattr(factorllm, "TUNED", 8)
    result = checked(factorllm.EXPERIMENT.studies[0])
    assert list(result["rows"]) == ["dense", *factorllm.ARMS]
    there = on_subject.load("dense", 0, Run())
    dense, tokens = factorllm.dense_of(there), there.judged("maths")[0]
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens), there.model(tokens))

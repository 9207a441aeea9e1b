"""The experiments on models made from dense ones run from end to end, hardly trained."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch
from bench.studies import on_subject, subject
from bench.studies.adamoe import claims as adamoe
from bench.studies.bam import claims as bam
from bench.studies.composition import claims as composition
from bench.studies.composition.training import Settings
from bench.studies.factorllm import claims as factorllm
from bench.studies.study import Paused, Results, Run
from bench.studies.training import Recipe

pytest.importorskip("safetensors")

TEXT = ("reference", "maths")


def checked(study, run=None):
    """One seed of a study; its claims are made of it."""
    (name,) = study.runs
    result = json.loads(json.dumps(study.runs[name](0, run or Run()), allow_nan=False))
    results = Results({name: {0: result}}, [0])
    for hypothesis in study.hypotheses:
        assert len(hypothesis.of(results)) == 1, hypothesis.statement
    assert study.setting() and study.pictures(results)
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
    plan = factorllm.Plan(steps=3, rate=5e-4)
    study = factorllm.study("factorllm-toy", "toy", 1, 1.0, "dense", plan, apart=False)
    result = checked(study)
    assert list(result["rows"]) == ["dense", *factorllm.ARMS]
    apart = factorllm.study("factorllm-toy", "toy", 1, 1.0, "dense", plan, apart=True)
    assert {arm: apart.runs[arm](0, Run())["rows"][arm] for arm in apart.runs} == result["rows"]
    there = on_subject.load("dense", 0, Run())
    dense, tokens = factorllm.dense_of(there), there.judged("maths")[0]
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens), there.model(tokens))


@pytest.mark.parametrize("tuned", [False, True])
def test_composition(tmp_path, tuned):
    recipe = Recipe(steps=2, batch=4, length=16, heldout_batches=1, warmup=1)
    settings = Settings(
        domains=("reference", "maths", "names"), hidden_size=16, num_layers=1, prompts=12,
        prompt_length=16, labeled=3, router_steps=5,
    )  # fmt: skip
    plan = composition.Plan(settings, recipe, recipe, 32, tuned)
    study = composition.study("composition-toy", "toy", 1, 1.0, plan)
    result = checked(study, Run(tmp_path / "run.pt"))
    rows = result["rows"]
    assert rows["best kept model of each prompt"][composition.KNOWN] == min(
        row[composition.KNOWN] for arm, row in rows.items()
        if composition.KNOWN in row and arm != composition.LARGE
    )  # fmt: skip
    assert 0 <= rows[composition.OF_PROMPTS][composition.AGREE] <= 1
    assert checked(study, Run(tmp_path / "run.pt")) == result  # Nothing is trained again.


def test_adamoe(monkeypatch, tmp_path):
    monkeypatch.setattr(adamoe, "STRONGEST", 0.1)
    monkeypatch.setattr(
        adamoe, "WEIGHTS", {"coupled": (0.01, 0.1), "additive": (0.01, 0.1), "concat": (0.01,)}
    )
    plan = adamoe.Plan(pretrain=4, tune=4, early=2, batch=8, episodes=8)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}
    study = adamoe.study("adamoe-toy", "toy", 1, 1.0, plan, **sizes)
    result = checked(study, Run(tmp_path / "run.pt"))
    assert len(result["rows"]) == 7 and "correlation" in result["rows"]["additive, balance 0.01"]
    # A run that is cut says so, and one that goes on has the same rows.
    with pytest.raises(Paused):
        checked(study, Run(tmp_path / "cut.pt", deadline=0.0))
    assert checked(study, Run(tmp_path / "cut.pt")) == result


def test_dynamicdino(monkeypatch):
    pytest.importorskip("transformers")
    dynamicdino = pytest.importorskip("bench.studies.dynamicdino.claims")
    found = {"AP, known": 0.5, "AP50, known": 0.5, "AP, held out": 0.5, "AP50, held out": 0.5}
    monkeypatch.setattr(dynamicdino, "judge", lambda model, scenes: dict(found))
    plan = dynamicdino.Plan(pretrain=2, tune=2, early=1, batch=2, scenes=2)
    sizes = {"hidden_size": 32, "ffn_size": 16, "num_heads": 2, "num_queries": 8}
    rows = checked(dynamicdino.study("dynamicdino-toy", "toy", 1, 1.0, plan, **sizes))["rows"]
    assert list(rows) == ["before tuning", *dynamicdino.ARMS]
    difference = {arm: rows[arm][dynamicdino.DIFFERENCE] for arm in dynamicdino.ARMS}
    assert difference[dynamicdino.DENSE] == 0 and difference[dynamicdino.EXPERTS] < 1e-5
    assert difference[dynamicdino.RANDOM] > 1e-5


def test_sentence(monkeypatch):
    pytest.importorskip("transformers")
    sentence = pytest.importorskip("bench.studies.sentence.claims")
    from bench.studies.sentence.tokens import ByteTokens

    from moe_ops import zoo

    tokens = ByteTokens()
    tokens.tokenizer = types.SimpleNamespace(enable_truncation=lambda length: None)

    def start(settings):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 3, "num_heads": 1}
        return zoo.create_model(
            "sentence", domains=settings.domains, moe_layers=(), head="mean", **sizes
        ), tokens

    words = ["one", "two and a half", "three"] * 4
    monkeypatch.setattr(
        sentence, "verses", lambda code: [f"{code} {i} {word}" for i, word in enumerate(words)]
    )
    monkeypatch.setattr(sentence, "start", start)
    plan = sentence.Plan(train=8, test=4, steps=1, batch=4)
    rows = checked(sentence.study("sentence-toy", "toy", 1, 1.0, plan))["rows"]
    assert list(rows)[:2] == [sentence.START, sentence.SPECIALISTS] and len(rows) == 6
    # What is kept of the frozen layers gives what the whole encoder does.
    torch.manual_seed(0)
    whole = start(types.SimpleNamespace(domains=sentence.LANGUAGES))[0].eval()
    domains = torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        wanted = whole(*tokens(words[:3]), domains)
        part, kept = sentence.upper(whole, tokens, words[:3], 2)
        found = part(*kept.tokenize(words[:3]), domains)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)

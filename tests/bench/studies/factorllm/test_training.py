"""The command: what the routers of each way to train them get."""

from __future__ import annotations

import random

import pytest
import torch
from bench.studies import language as fit
from bench.studies import python_texts
from bench.studies.factorllm import training

from moe_ops.zoo.factorllm import FactorLLM
from moe_ops.zoo.llama import Llama

SETTINGS = training.Settings(
    domains=("letters",), dense_steps=2, steps=2, batch_size=2, length=16, hidden_size=16,
    num_layers=1, rows=2,
)  # fmt: skip


def texts():
    draw = random.Random(0)
    return {"letters": python_texts.Text.of(bytes(draw.choices(b"abcdefgh", k=800)))}


def test_all_ways_to_train_the_router(tmp_path, monkeypatch):
    report = training.train(tmp_path, SETTINGS, texts=texts(), progress=False)
    assert list(report["arms"]) == ["dense", *training.ARMS]
    dense = Llama.from_pretrained(tmp_path / "dense")
    torch.manual_seed(SETTINGS.seed + 1)
    start = FactorLLM.from_dense(dense).layers[0].mlp.router.weight
    for arm, kind in training.ARMS.items():
        model = kind.from_pretrained(tmp_path / arm)
        same = torch.equal(model.layers[0].mlp.router.weight, start)
        assert same == (arm == "released"), arm
    for arm, row in report["arms"].items():
        kept = row.get("accuracy kept", 1.0)
        assert kept * report["arms"]["dense"]["accuracy"] == pytest.approx(row["accuracy"]), arm
    # What is there is not trained again.
    monkeypatch.setattr(fit, "train_steps", None)
    assert training.train(tmp_path, SETTINGS, texts=texts(), progress=False) == report

"""The command: what the routers of each way to train them get."""

from __future__ import annotations

import random

import pytest
import torch

from moe_ops.zoo import _texts
from moe_ops.zoo.factorllm import FactorLLM, training
from moe_ops.zoo.factorllm import __main__ as command
from moe_ops.zoo.llama import Llama
from moe_ops.zoo.lm import fit

SETTINGS = training.Settings(
    domains=("letters",), dense_steps=2, steps=2, batch_size=2, length=16, hidden_size=16,
    num_layers=1, rows=2,
)  # fmt: skip


def texts():
    draw = random.Random(0)
    return {"letters": _texts.Text.of(bytes(draw.choices(b"abcdefgh", k=800)))}


def test_all_ways_to_train_the_router(tmp_path, monkeypatch):
    report = training.train(tmp_path, SETTINGS, texts=texts(), progress=False)
    assert list(report["arms"]) == ["dense", *training.ROUTER_TRAINING]
    dense = Llama.from_pretrained(tmp_path / "dense")
    torch.manual_seed(SETTINGS.seed + 1)
    start = FactorLLM.from_dense(dense).layers[0].mlp.router.weight
    for arm in training.ROUTER_TRAINING:
        model = FactorLLM.from_pretrained(tmp_path / arm)
        assert model.config.router_training == arm
        same = torch.equal(model.layers[0].mlp.router.weight, start)
        assert same == (arm == "released"), arm
    for arm, row in report["arms"].items():
        kept = row.get("accuracy kept", 1.0)
        assert kept * report["arms"]["dense"]["accuracy"] == pytest.approx(row["accuracy"]), arm
    # What is there is not trained again.
    monkeypatch.setattr(fit, "train_steps", None)
    assert training.train(tmp_path, SETTINGS, texts=texts(), progress=False) == report


def test_command(monkeypatch, capsys):
    def train(folder, settings, *, progress):
        assert (folder, progress, settings.top_k) == ("there", False, 2)
        return {"arms": {"prior": {"loss": 1.5}}}

    monkeypatch.setattr(command, "train", train)
    command.main(["--folder", "there", "--quiet", "--top-k", "2"])
    assert "loss 1.5000" in capsys.readouterr().out
    with pytest.raises(ValueError, match="arms must be one of prior, straight_through, released"):
        command.main(["--folder", "there", "--arms", "other"])

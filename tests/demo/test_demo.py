from __future__ import annotations

import itertools
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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import moe_ops
from moe_ops import viz
from moe_ops.cli.app import app
from moe_ops.demo import data, train
from moe_ops.demo.checkpoint import Checkpointer, CheckpointError
from moe_ops.demo.model import ModelConfig, make_model
from moe_ops.demo.train import TrainConfig, max_violation
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
    line = ["demo", "--smoke", "--no-hf", "--threads", "1", *map(str, arguments)]
    result = runner.invoke(app, line, env={"COLUMNS": "160"})
    assert result.exit_code == expect, result.output
    return result.output


# --- text


def test_split_is_by_file_and_repeatable(text):
    first, second = data.load_corpus(text), data.load_corpus(text)
    assert first.sha256 == second.sha256
    assert torch.equal(first.heldout, second.heldout)
    assert first.num_train_files + first.num_heldout_files == 8
    heldout = first.heldout.numpy().tobytes()
    files = {f.name: f.read_bytes() for f in text.iterdir()}
    assert sum(content in heldout for content in files.values()) == first.num_heldout_files >= 1
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


def test_entropies_by_hand():
    def corpus(train: bytes, heldout: bytes) -> data.Corpus:
        return data.Corpus(data._to_tensor(train), data._to_tensor(heldout), "test", 1, 1, "")

    result = data.entropies(corpus(b"aabb" * 5000, b"abba"))
    assert result["unigram"] == pytest.approx(1.0, abs=1e-3)
    # In the training text a and b follow each other and themselves equally often.
    assert result["bigram"] == pytest.approx(1.0, abs=1e-2)
    result = data.entropies(corpus(b"ab" * 5000, b"abab"))
    assert result["unigram"] == pytest.approx(1.0, abs=1e-3)
    assert result["bigram"] == pytest.approx(0.0, abs=1e-2)


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


def test_max_violation():
    load = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]])
    assert max_violation(load).tolist() == [0.0, 3.0]


# --- the whole demo


def test_run_learns_and_leaves_its_files(text, tmp_path):
    out = tmp_path / "out"
    output = demo("--data", text, "--out", out, "--steps", 60)
    summary = json.loads((out / "summary.json").read_text())
    entropy = summary["entropy_bits_per_byte"]
    assert summary["heldout_bits_per_byte"] < entropy["unigram"] < 8
    assert summary["training"]["steps"] == 60
    assert "bits/byte" in output
    for name in ("loss.png", "expert_load.png", "token_experts.png"):
        assert (out / name).stat().st_size > 5000
        assert name in output
    model = DeepSeek.from_pretrained(out / "model")
    assert model.config.num_experts == 4 and model.config.tie_embeddings
    saved = Checkpointer(out).load().tensors
    for name, weight in model.named_parameters():
        assert torch.equal(weight, saved[f"model.{name}"]) and torch.isfinite(weight).all(), name
    # A finished run may be replaced without a word.
    demo("--data", text, "--out", out, "--steps", 3)
    assert json.loads((out / "summary.json").read_text())["training"]["steps"] == 3


def killed_after_its_first_checkpoint(line, environment, out) -> bool:
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not (out / "checkpoint.safetensors").exists() and process.poll() is None:
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
    line = [sys.executable, "-m", "moe_ops.demo", "--smoke", "--no-hf", "--threads", "1"]
    line += [*map(str, options), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(moe_ops.__file__).parents[1])}
    while not killed_after_its_first_checkpoint(line, environment, out):
        shutil.rmtree(out)  # It was done before the signal came.

    stopped = Checkpointer(out).load()
    assert stopped.note is None
    assert 0 < stopped.metadata["step"] < steps
    output = demo("--out", out, "--resume")
    assert f"Continuing after step {stopped.metadata['step']} of {steps}" in output

    whole = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    assert (out / "model" / "model.safetensors").read_bytes() == whole
    one, two = Checkpointer(tmp_path / "whole").load(), Checkpointer(out).load()
    assert one.metadata == two.metadata
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        if name != "history.seconds":
            assert torch.equal(tensor.view(-1).view(torch.uint8), _bits(two.tensors[name])), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


@pytest.fixture
def unfinished(text, tmp_path, monkeypatch) -> Path:
    """The folder of a run that stopped after its fourth step."""
    from moe_ops.demo.train import Trainer

    out = tmp_path / "out"
    train_step = Trainer.train_step

    def stop(self):
        result = train_step(self)
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(Trainer, "train_step", stop)
    output = demo("--data", text, "--out", out, "--steps", 8, expect=130)
    assert "--resume" in output
    monkeypatch.setattr(Trainer, "train_step", train_step)
    return out


def test_unfinished_run_is_not_overwritten_by_accident(unfinished, text):
    output = demo("--data", text, "--out", unfinished, expect=1)
    assert "unfinished run at step 4" in output
    demo("--data", text, "--out", unfinished, "--steps", 2, "--overwrite")


def test_resume_refuses_other_settings(unfinished, tmp_path):
    output = demo("--out", unfinished, "--resume", "--steps", 9, expect=1)
    assert "--steps must be 8" in output
    output = demo("--out", unfinished, "--resume", "--seed", 1, expect=1)
    assert "--seed must be 0" in output
    other = tmp_path / "other.txt"
    other.write_text("something else " * 300)
    output = demo("--out", unfinished, "--resume", "--data", other, expect=1)
    assert "must see the text" in output


def test_damaged_checkpoint_falls_back_to_the_one_before(unfinished):
    path = unfinished / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    output = demo("--out", unfinished, "--resume")
    assert "checkpoint.safetensors is damaged" in output
    assert "continuing from checkpoint.previous.safetensors" in output


def test_damaged_checkpoints_get_one_sentence(unfinished):
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        path = unfinished / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    output = demo("--out", unfinished, "--resume", expect=1)
    assert "no usable checkpoint" in output and "checksum" in output
    assert "--overwrite" in output


def test_resume_without_a_checkpoint(tmp_path):
    assert "needs a checkpoint" in demo("--out", tmp_path, "--resume", expect=1)


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


def test_minutes_choose_the_steps(text, tmp_path, monkeypatch):
    """On a clock by which every step takes 25 ms, and a tenth more for what is between steps."""
    readings = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.025 * next(readings))
    monkeypatch.setattr(train, "time", clock)
    output = demo("--data", text, "--out", tmp_path, "--minutes", 0.01)
    assert "minutes here" in output
    steps = json.loads((tmp_path / "summary.json").read_text())["training"]["steps"]
    assert steps == round(0.6 / (0.025 * 1.1))


def test_hugging_face_part():
    pytest.importorskip("transformers")
    from moe_ops.demo.hf_compare import compare

    results = compare(smoke=True, budget_s=0.05)
    assert [result["model"] for result in results] == ["Qwen3-MoE", "Mixtral"]
    for result in results:
        assert result["passed"], result["errors"]
        assert set(result["forward"]["seconds"]) == {"eager", "grouped_mm", "moe_ops"}
        for measured in (result["forward"], result["forward_backward"]):
            seconds = measured["seconds"]
            for other, ratio in measured["speedup"].items():  # What is printed beside each other.
                assert ratio == seconds[other] / seconds["moe_ops"]


def test_hugging_face_part_with_an_old_transformers(monkeypatch):
    pytest.importorskip("transformers")
    from moe_ops.demo import hf_compare

    assert hf_compare.missing() is None
    monkeypatch.setattr(hf_compare.importlib.metadata, "version", lambda name: "5.6.2")
    assert 'or newer and found 5.6.2, pip install --upgrade "transformers>=' in hf_compare.missing()


# --- checkpoints


def test_checkpoint_is_a_safetensors_file(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.uint8),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "d": torch.zeros(0, 4, dtype=torch.int32),
    }
    checkpointer = Checkpointer(tmp_path)
    for step in range(4):
        checkpointer.save(tensors, {"step": step})
        tensors["a"] = torch.randn(3, 5 + 4 * (step % 2))
        assert checkpointer.load().metadata["step"] == step
    checkpointer.save(tensors, {"step": 4})
    loaded = load_file(tmp_path / "checkpoint.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    checkpointer.path.unlink()
    assert checkpointer.load().metadata["step"] == 3
    assert {f.name for f in tmp_path.iterdir()} == {"checkpoint.previous.safetensors"}


def test_checkpoints_keep_to_their_share_of_the_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpointer = Checkpointer(tmp_path, share=0.1)
    assert checkpointer.due

    def fsync(handle: int) -> None:
        now[0] += 0.5

    monkeypatch.setattr(os, "fsync", fsync)
    checkpointer.save({}, {"step": 1})
    assert now[0] == 101 and not checkpointer.due  # Of the file and of the folder.
    now[0] = 109.9
    assert not checkpointer.due
    now[0] = 110
    assert checkpointer.due


def test_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        Checkpointer(tmp_path).load()


def test_checkpoint_of_an_earlier_version_gets_one_sentence(tmp_path):
    from safetensors.torch import save_file

    about = json.dumps({"format": "moe_ops.demo/2", "run": {"step": 7}})
    tensors = {"a": torch.zeros(2), "~sha256": torch.zeros(32, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "checkpoint.safetensors", {"moe_ops.demo": about})
    output = demo("--out", tmp_path, "--resume", expect=1)
    assert output.splitlines()[-1] == (
        f"error: demo: no usable checkpoint in {tmp_path}: checkpoint.safetensors must be a "
        "checkpoint of this version of moe_ops (moe_ops.demo/3), got 'moe_ops.demo/2'; run with "
        "--overwrite to start again"
    )


def test_state_that_does_not_fit_its_sizes_gets_one_sentence(unfinished):
    checkpoint = Checkpointer(unfinished).load()
    checkpoint.metadata["config"]["model"]["hidden_size"] = 64
    Checkpointer(unfinished).save(checkpoint.tensors, checkpoint.metadata)
    output = demo("--out", unfinished, "--resume", expect=1)
    assert "does not fit together" in output and "--overwrite" in output


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

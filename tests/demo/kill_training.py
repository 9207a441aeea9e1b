"""Kills a training run again and again: ``python tests/demo/kill_training.py FOLDER KILLS SEED``.

A child trains a tiny model of the demo and tells each step through a pipe once it is saved. It is
killed at a random moment, and the next child goes on. Checked after each kill: the checkpoint is
whole, and no step that was said to be saved is lost. At the end the run goes on to its last step,
and its weights must be those of a run that was never killed, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from moe_ops._state import read_state, write_state
from moe_ops.demo import data
from moe_ops.demo.train import ModelConfig, TrainConfig, Trainer

# After the first step of a child; a step and its save take some milliseconds.
LONGEST_LIFE_S = 0.03


def config(steps: int) -> TrainConfig:
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_experts": 2, "context": 16}
    return TrainConfig(
        steps=steps,
        batch_size=2,
        eval_every=10**6,
        eval_windows=1,
        model=ModelConfig(**sizes, intermediate_size=16),
    )


def train(folder: Path, corpus: data.Corpus, steps: int, told: int) -> None:
    """To the end, from the checkpoint where there is one; `told` gets each saved step."""
    path, trainer = folder / "checkpoint.pt", Trainer(config(steps), corpus)
    if path.exists():
        trainer.restore(read_state(path))
    while not trainer.finished:
        trainer.train_step()
        write_state(path, trainer.state())
        os.write(told, trainer.step.to_bytes(4, "little"))


def kill_once(folder: Path, corpus: data.Corpus, steps: int, rng: random.Random) -> int:
    """The last step that the child told before it was killed, 0 for none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            train(folder, corpus, steps, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb", buffering=0) as pipe:
        # Some are killed while they load.
        said = pipe.read(4) if rng.random() < 0.9 else b""
        time.sleep(rng.uniform(0.0, LONGEST_LIFE_S))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
        said += pipe.readall()
    return int.from_bytes(said[-4:], "little")


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # Children of a process with threads could hang.
    rng = random.Random(seed)
    (folder / "text").write_bytes(bytes(rng.choices(b"abcdefgh \n", k=4000)))
    corpus = data.load_corpus(folder / "text")
    steps = 1000 + 100 * kills
    whole = Trainer(config(steps), corpus)
    whole.train_step()  # What is made at the first call is not made in each child.

    run = folder / "killed"
    run.mkdir()
    path = run / "checkpoint.pt"
    reached = in_save = 0
    for number in range(kills):
        told = kill_once(run, corpus, steps, rng)
        in_save += any(path.name.endswith(".tmp") for path in run.iterdir())
        if told == reached == 0 and not path.exists():
            continue
        step = read_state(path)["step"]
        assert step >= max(told, reached), f"kill {number}: at {step}, {max(told, reached)} saved"
        reached = step

    killed = Trainer(config(steps), corpus)
    killed.restore(read_state(path))
    for trainer in (killed, whole):
        while trainer.step < reached + 5:
            trainer.train_step()
    for one, two in zip(killed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, two), "the run that was killed has other weights"
    write_state(path, killed.state())
    left = [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    assert not left, f"left behind: {left}"
    print(f"{kills} kills, {in_save} in a save; {reached} steps, none lost; the same bits")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Files in which a bit has changed are refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from moe_ops._state import read_state, write_state
from moe_ops.demo.checkpoint import Checkpointer, CheckpointError


def check_flips(path: Path, count: int, rng: random.Random) -> None:
    """`count` random bits and bytes: the reader refuses every file."""
    content = path.read_bytes()
    checkpointer = Checkpointer(path.parent)
    assert checkpointer.load().metadata["step"] == 3
    for number in range(count):
        damaged = bytearray(content)
        # A third each: header, digest and its surroundings, anywhere.
        span = ((0, 1500), (len(content) - 64, len(content)), (0, len(content)))[number % 3]
        damaged[rng.randrange(*span)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no usable checkpoint"):
            checkpointer.load()
    path.write_bytes(content)
    assert checkpointer.load().note is None


@pytest.mark.parametrize("count", [300, pytest.param(6000, marks=pytest.mark.full)])
def test_every_flipped_bit_is_noticed(tmp_path, seed, count):
    checkpointer = Checkpointer(tmp_path)
    values = {f"layer.{i}": torch.randn(20, 20) for i in range(20)}
    checkpointer.save(values | {"rng": torch.arange(99, dtype=torch.uint8)}, {"step": 3, "x": "y"})
    check_flips(checkpointer.path, count, random.Random(seed))


def test_flipped_state_is_refused(tmp_path, seed):
    """Reading gives what was written, or fails; a bit of the archive's padding may change."""
    path, weights = tmp_path / "state.pt", torch.randn(30)
    write_state(path, {"model": weights, "step": 4})
    content, rng = path.read_bytes(), random.Random(seed)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_state(path)
        except ValueError as error:
            assert "must be an intact file of torch.save" in str(error)
            refused += 1
        else:
            assert torch.equal(found["model"], weights) and found["step"] == 4
    assert refused > 50
    for cut in (0, 10, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"must be an intact file of torch\.save"):
            read_state(path)

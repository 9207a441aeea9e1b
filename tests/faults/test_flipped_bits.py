"""Files in which a bit has changed are refused."""

from __future__ import annotations

import random

import pytest
import torch

from moe_ops._state import read_state, write_state


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

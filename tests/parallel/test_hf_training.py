"""examples/train_hf.py: losses of Trainer and of a loop on accelerate are those of one process."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from safetensors.torch import load_file

from moe_ops.hf.experts.parallel import Interface

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(Interface is None, reason="transformers before 5.23"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_hf.py"


def train(rank, folder, loop, ep, ranks):
    """The example, in a process that torchrun would have started."""
    from accelerate.state import AcceleratorState

    spec = importlib.util.spec_from_file_location("train_hf", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    environment = {}
    if ranks > 1:
        environment = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        environment |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    arguments = ["--loop", loop, "--ep", str(ep), "--steps", "3", "--context", "16"]
    arguments += ["--folder", str(folder / str(ranks)), "--data", str(folder / "text.txt")]
    try:
        with mock.patch.dict(os.environ, environment):
            return example.main(arguments)
    finally:  # What accelerate found out about the processes is of this call.
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("loop", ["trainer", "accelerate"])
def test_losses_are_those_of_one_process(processes, tmp_path, loop):
    text = "the quick brown fox jumps over the lazy dog; " * 50
    (tmp_path / "text.txt").write_text(text)
    (alone,) = processes.run(train, tmp_path, loop, 1, 1, world=1)
    assert len(alone) == 3 and alone[2] < alone[0]
    for losses in processes.run(train, tmp_path, loop, 2, 4):
        assert losses == pytest.approx(alone, rel=1e-5)
    trained = "trained/model.safetensors"
    want, got = (load_file(tmp_path / ranks / trained) for ranks in ("1", "4"))
    # Three steps of at most 1e-3, and gradients near zero point where rounding says.
    torch.testing.assert_close(got, want, rtol=0, atol=3e-4)

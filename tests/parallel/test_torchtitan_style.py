"""examples/torchtitan_style.py: losses are those of one process, on its meshes and torchtitan's."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu_only

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchtitan_style.py"


def train(rank, ranks, ep, dims):
    spec = importlib.util.spec_from_file_location("torchtitan_style", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    if dims == "torchtitan":
        from torchtitan.distributed import parallel_dims
        from torchtitan.distributed.utils import clip_grad_norm_

        parallel_dims.device_type = "cpu"  # Without an accelerator it takes "cuda".
        meshes = parallel_dims.ParallelDims(
            1, ranks, 1, 1, 1, ep, ranks, spmd_backend="partial_dtensor"
        )
        meshes.build_mesh()
        example.clip_grad_norm_ = lambda *args: clip_grad_norm_(*args, ep_enabled=True)
    else:
        meshes = example.Dims(ep)
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog; " * 50))
    args = argparse.Namespace(steps=3, batch_size=8, context=8, dispatch="auto")
    return example.train(meshes, text, args)


@pytest.mark.parametrize("dims", ["ours", "torchtitan"])
def test_losses_are_those_of_one_process(processes, dims):
    if dims == "torchtitan":
        pytest.importorskip("torchtitan")
    (alone,) = processes.run(train, 1, 1, "ours", world=1)
    assert len(alone) == 3 and alone[2] < alone[0]
    for losses in processes.run(train, 4, 2, dims):
        assert losses == pytest.approx(alone, rel=1e-5)

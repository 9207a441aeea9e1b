"""Checkpoints of sharded experts: torch.distributed.checkpoint across layouts, and lost ranks."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from tests.helpers.processes import Processes, RankError

from .common import Run

pytestmark = pytest.mark.cpu_only


def save_after_steps(rank, ep, folder):
    run = Run(rank, ep)
    run.steps(0, 3)
    run.save(folder)
    return run.everything()


def load_and_save_again(rank, ep, source, target):
    run = Run(rank, ep, seed=1)
    run.load(source)
    if target is not None:
        run.save(target)
    return run.everything()


def test_a_checkpoint_fits_other_layouts(processes, tmp_path):
    """Four ranks, then two, then one, each from the files of the one before: bitwise identical
    results."""
    folders = [tmp_path / str(i) for i in range(4)]
    (want, *_) = processes.run(save_after_steps, 2, folders[0])
    assert sum("exp_avg_sq" in name for name in want) == sum(" " not in name for name in want)
    layouts = [(4, 4), (2, 2), (1, 1)]
    for (world, ep), source, target in zip(layouts, folders, folders[1:], strict=False):
        for got in processes.run(load_and_save_again, ep, source, target, world=world):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def steps_with_a_save(rank, ep, folder):
    run = Run(rank, ep)
    losses = run.steps(0, 2)
    run.save(folder)
    return losses + run.steps(2, 5), run.everything()


def steps_after_a_load(rank, ep, folder, first, last):
    run = Run(rank, ep, seed=1)
    run.load(folder)
    return run.steps(first, last), run.everything()


def steps_until_killed(rank, ep, folder):
    run = Run(rank, ep)
    run.steps(0, 2)
    run.save(folder)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return run.steps(2, 5)


def test_a_killed_rank_ends_the_others_and_training_resumes(tmp_path):
    """To the bit at the same layout; at another one to rounding."""
    with Processes(2) as processes:
        losses, want = processes.run(steps_with_a_save, 2, tmp_path / "whole")[0]
        with pytest.raises(RankError) as caught:
            processes.run(steps_until_killed, 2, tmp_path / "killed", timeout=20)
        assert "it ended with -9" in caught.value.ranks[1]
        assert "Error" in caught.value.ranks[0]  # Which ended by itself, with a word of why.
        again = processes.run(steps_after_a_load, 2, tmp_path / "killed", 2, 5)
        for its_losses, got in again:
            assert its_losses == losses[2:]
            assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
        ((its_losses, _),) = processes.run(
            steps_after_a_load, 1, tmp_path / "killed", 2, 5, world=1
        )
        torch.testing.assert_close(its_losses, losses[2:], rtol=1e-4, atol=0)

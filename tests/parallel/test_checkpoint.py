"""Checkpoints of sharded experts: torch.distributed.checkpoint across layouts, and lost ranks."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.helpers.processes import Processes, RankError
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from moe_ops.parallel.sharding import clip_grad_norm_, fully_shard_moe, make_meshes, shard_experts

from .common import Model, batch, loss_of, mean_over_ranks, parameters, whole

pytestmark = pytest.mark.cpu_only


class Run:
    """A model in training, sharded for ep ranks beside FSDP2, with its optimizer."""

    def __init__(self, rank, ep, seed=0):
        self.rank = rank
        meshes = make_meshes(ep)
        self.model = shard_experts(Model(seed=seed), meshes.ep)
        for block in self.model.layers:
            fully_shard_moe(block, meshes.dp, meshes.efsdp)
        fully_shard(self.model, mesh=meshes.dp)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            x, target = batch(step, self.rank, dist.get_world_size())
            loss = loss_of(self.model, x, target)
            self.optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            losses.append(mean_over_ranks(loss))
        return losses

    def save(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def everything(self):
        """Weights and Adam's state by name, whole."""
        found = parameters(self.model)
        names = {p: name for name, p in self.model.named_parameters()}
        for p, state in self.optimizer.state.items():
            found |= {f"{names[p]} {key}": whole(value) for key, value in state.items()}
        return found


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
    """Four ranks, then two, then one, each from the files of the one before: the same bits."""
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

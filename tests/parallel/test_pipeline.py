"""Pipeline parallelism: stages of torch.distributed.pipelining train as one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.utils import clip_grads_with_norm_

from moe_ops.layers import RoutingStats, update_expert_bias
from moe_ops.parallel import clip_grad_norm_, fully_shard_moe, shard_experts

from .common import EXPERTS, HIDDEN, TOKENS, Model, assert_same, batch, gradients

pytestmark = [pytest.mark.xdist_group("parallel"), pytest.mark.cpu_only]

MICRO_BATCHES = 2
MAX_NORM = 0.05


class Stage(nn.Module):
    """Some layers of a model. The loss of balance of all layers so far travels with the tokens,
    so that the last stage has the whole loss and each layer gets its gradient."""

    def __init__(self, layers, first, head=None):
        super().__init__()
        self.layers = nn.ModuleDict({str(first + i): layer for i, layer in enumerate(layers)})
        self.head = head
        self.stats = RoutingStats()

    def forward(self, x, balance=None):
        balance = x.new_zeros(1) if balance is None else balance
        for name, layer in self.layers.items():
            out = layer.moe(layer.norm(layer.dense(x)), return_routing=True)
            x = x + out.y
            balance = balance + out.aux_losses["load_balancing"]
            self.stats.update(out.topk_ids, EXPERTS, layer=int(name))
        return (x if self.head is None else self.head(x)), balance


def loss_of(out, target):
    y, balance = out
    return (y - target).square().mean() + 0.1 * balance.sum()


def make_model():
    return Model(aux_losses=("load_balancing",), expert_bias=True)


def biases(stage):
    return [layer.moe.router.expert_bias.clone() for layer in stage.layers.values()]


def one_process(ranks):
    """The step with the micro-batches of all ranks of a stage together."""
    model = make_model()
    stage = Stage(model.layers, 0, model.head)
    losses = []
    for i in range(MICRO_BATCHES):
        parts = [batch(0, rank, ranks) for rank in range(ranks)]
        x, target = (torch.cat([p[j].chunk(MICRO_BATCHES)[i] for p in parts]) for j in (0, 1))
        loss = loss_of(stage(x), target)
        (loss / MICRO_BATCHES).backward()
        losses.append(float(loss.detach()))
    norm = torch.nn.utils.clip_grad_norm_(stage.parameters(), MAX_NORM)
    update_expert_bias(stage, rate=0.5)
    return losses, gradients(stage), norm, biases(stage), stage.stats.as_dict()


def pipeline_step(rank, make_schedule, static):
    ranks = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, 1, ranks), mesh_dim_names=("pp", "efsdp", "ep"))
    index, part = mesh["pp"].get_local_rank(), mesh["ep"].get_local_rank()
    stage_group = mesh["ep"].get_group()

    model = make_model()
    stage = Stage(model.layers[index : index + 1], index, model.head if index else None)
    for layer in stage.layers.values():
        layer.moe.loss_group = stage_group
    if ranks > 1:
        shard_experts(stage, mesh["ep"])
        for layer in stage.layers.values():
            fully_shard_moe(layer.moe, mesh["ep"], mesh["efsdp"])
        fully_shard(stage, mesh=mesh["ep"])

    shapes = {}
    if static:  # Otherwise torch finds them by a forward and a backward of its own.
        tokens = TOKENS // ranks // MICRO_BATCHES
        between = tuple(torch.empty(s, requires_grad=True) for s in ((tokens, HIDDEN), (1,)))
        end = torch.empty(tokens, 4, requires_grad=True), between[1]
        shapes = {
            "input_args": between if index else (torch.empty(tokens, HIDDEN),),
            "output_args": end if index else between,
        }
    pipeline = PipelineStage(
        stage, index, 2, torch.device("cpu"), group=mesh["pp"].get_group(), **shapes
    )
    schedule = make_schedule(pipeline, MICRO_BATCHES, loss_fn=loss_of)
    x, target = batch(0, part, ranks)
    losses = []
    if index == 0:
        schedule.step(x)
    else:
        schedule.step(target=target, losses=losses)

    norm = clip_grad_norm_(stage.parameters(), float("inf"), foreach=False)
    squares = norm.square()
    dist.all_reduce(squares, group=mesh["pp"].get_group())
    norm = squares.sqrt()
    clip_grads_with_norm_(stage.parameters(), MAX_NORM, norm, foreach=False)
    update_expert_bias(stage, rate=0.5, group=stage_group)
    stage.stats.all_reduce(stage_group)
    both = [None, None]
    dist.all_gather_object(both, stage.stats.as_dict(), group=mesh["pp"].get_group())
    of_layers = both[0] | both[1]
    mean = torch.tensor([float(loss.detach()) for loss in losses])
    dist.all_reduce(mean, group=stage_group)
    return index, (mean / ranks).tolist(), gradients(stage), norm, biases(stage), of_layers


@pytest.mark.parametrize(
    ("make_schedule", "world"), [(ScheduleGPipe, 2), (Schedule1F1B, 4)], ids=["2", "4"]
)
def test_stages(processes, make_schedule, world):
    losses, grads, norm, bias, stats = one_process(world // 2)
    for found in processes.run(pipeline_step, make_schedule, True, world=world):
        index, got_losses, got_grads, got_norm, got_bias, got_stats = found
        if index == 1:
            assert got_losses == pytest.approx(losses, rel=1e-5)
        own = {
            n: g
            for n, g in grads.items()
            if n.startswith((f"layers.{index}.", "head"[: index * 4] or "-"))
        }
        assert_same(got_grads, own)
        torch.testing.assert_close(got_norm, norm, rtol=1e-5, atol=0)
        assert torch.equal(got_bias[0], bias[index])
        assert got_stats == stats

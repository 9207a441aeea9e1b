"""Pipeline parallelism: stages of torch.distributed.pipelining train as one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from moe_ops.layers import ExpertLoadStats, update_expert_bias
from moe_ops.parallel import clip_grad_norm_, fully_shard_moe, shard_experts

from .common import EXPERTS, HIDDEN, TOKENS, Model, assert_same, batch, gradients

pytestmark = pytest.mark.cpu_only

MICRO_BATCHES = 4
MAX_NORM = 0.05


class Stage(nn.Module):
    """Some layers of a model. The loss of balance of all layers so far travels with the tokens,
    so that the last stage has the whole loss and each layer gets its gradient."""

    def __init__(self, layers, first, head=None):
        super().__init__()
        self.layers = nn.ModuleDict({str(first + i): layer for i, layer in enumerate(layers)})
        self.head = head
        self.stats = ExpertLoadStats()

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


def make_model(layers):
    return Model(layers, aux_losses=("load_balancing",), expert_bias=True)


def biases(stage):
    return [layer.moe.router.expert_bias.clone() for layer in stage.layers.values()]


def one_process(ranks, layers):
    """The step with the micro-batches of all ranks of a stage together."""
    model = make_model(layers)
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


def pipeline_step(rank, name, layers):
    """Two ranks, or two times two with experts shared out, have one or two layers each."""
    ranks = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, 1, ranks), mesh_dim_names=("pp", "efsdp", "ep"))
    index, part = mesh["pp"].get_local_rank(), mesh["ep"].get_local_rank()
    pp_group, stage_group = mesh["pp"].get_group(), mesh["ep"].get_group()

    model = make_model(layers)
    numbers, zero_bubble = [index], "ZeroBubble" in name
    if layers == 4:
        # The second stage of a rank: back from the last, or round again.
        numbers.append(3 - index if zero_bubble else index + 2)
    own = nn.ModuleList(
        Stage(model.layers[i : i + 1], i, model.head if i == layers - 1 else None) for i in numbers
    )
    for stage in own:
        shard(stage, mesh, with_fsdp=not zero_bubble)

    # Otherwise torch finds shapes by a forward and a backward of made-up tokens, which count.
    tokens = TOKENS // ranks // MICRO_BATCHES
    between = tuple(torch.empty(s, requires_grad=True) for s in ((tokens, HIDDEN), (1,)))
    end = torch.empty(tokens, 4, requires_grad=True), between[1]
    stages = [
        PipelineStage(
            stage,
            i,
            layers,
            torch.device("cpu"),
            input_args=between if i else (torch.empty(tokens, HIDDEN),),
            output_args=end if stage.head is not None else between,
            group=pp_group,
        )
        for i, stage in zip(numbers, own, strict=True)
    ]
    schedule = getattr(schedules, name)(
        stages if layers == 4 else stages[0], MICRO_BATCHES, loss_fn=loss_of
    )
    x, target = batch(0, part, ranks)
    losses = []
    last = {"target": target, "losses": losses} if any(s.is_last for s in stages) else {}
    schedule.step(*([x] if index == 0 else []), **last)

    if zero_bubble:
        average(own, stage_group)

    norm = clip_grad_norm_(own.parameters(), float("inf"), foreach=False)
    squares = norm.square()
    dist.all_reduce(squares, group=pp_group)
    norm = squares.sqrt()
    clip_grads_with_norm_(own.parameters(), MAX_NORM, norm, foreach=False)
    update_expert_bias(own, rate=0.5, group=stage_group)
    stats = {}
    for stage in own:
        stats |= stage.stats.all_reduce(stage_group).as_dict()
    both = [None, None]
    dist.all_gather_object(both, stats, group=pp_group)
    grads = {}
    for stage in own:
        grads |= gradients(stage)
    mean = torch.tensor([float(loss.detach()) for loss in losses])
    dist.all_reduce(mean, group=stage_group)
    found = (mean / ranks).tolist(), grads, norm, dict(zip(numbers, map(biases, own), strict=True))
    return *found, both[0] | both[1]


def shard(stage, mesh, with_fsdp):
    for layer in stage.layers.values():
        layer.moe.loss_group = mesh["ep"].get_group()
    if mesh["ep"].size() == 1:
        return
    shard_experts(stage, mesh["ep"])
    if with_fsdp:
        for layer in stage.layers.values():
            fully_shard_moe(layer.moe, mesh["ep"], mesh["efsdp"])
        fully_shard(stage, mesh=mesh["ep"])


def average(model, group):
    """Averages gradients as FSDP2 does, which loses gradients where a schedule splits backward."""
    for p in model.parameters():
        if isinstance(p.grad, DTensor):  # The sum over the ranks.
            p.grad.div_(group.size())
        else:
            dist.all_reduce(p.grad, group=group)
            p.grad.div_(group.size())


@pytest.mark.parametrize(
    ("name", "world", "layers"),
    [
        ("ScheduleGPipe", 2, 2),
        ("Schedule1F1B", 4, 2),
        ("ScheduleInterleaved1F1B", 4, 4),
        ("ScheduleZBVZeroBubble", 4, 4),
    ],
)
def test_stages(processes, name, world, layers):
    losses, grads, norm, bias, stats = one_process(world // 2, layers)
    ranks = processes.run(pipeline_step, name, layers, world=world)
    assert any(found[0] for found in ranks)
    for got_losses, got_grads, got_norm, got_bias, got_stats in ranks:
        if got_losses:
            assert got_losses == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(got_norm, norm, rtol=1e-5, atol=0)
        for number, (got,) in got_bias.items():
            assert torch.equal(got, bias[number])
        assert got_stats == stats
        names = tuple(f"layers.{number}." for number in got_bias)
        names += ("head.",) * (layers - 1 in got_bias)
        assert_same(got_grads, {n: g for n, g in grads.items() if n.startswith(names)})

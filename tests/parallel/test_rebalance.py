"""Experts that move between ranks in training: bits of what moves, outputs, steps, checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.helpers.moe import build_moe
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule

import moe_ops
from moe_ops.layers import ExpertLoadStats, Experts, record_routing
from moe_ops.parallel import (
    ExpertPlacement,
    banks,
    clip_grad_norm_,
    init_moe_meshes,
    move_experts,
    plan_placements,
    shard_experts,
)
from moe_ops.parallel.comm import all_to_all_rows
from moe_ops.testing import assert_identical

from .common import EXPERTS, Model, Run, assert_same, batch, gradients, loss_of, whole

pytestmark = pytest.mark.cpu_only

NEAR = ExpertPlacement(8, 2, (1, 0, 2, 3, 5, 4, 6, 7))  # All moves stay on their rank.
FAR = ExpertPlacement(8, 2, (6, 1, 4, 3, 2, 5, 0, 7))
FOUR = ExpertPlacement(8, 4, (7, 2, 0, 4, 5, 3, 6, 1))
# Ten of two ranks: experts 0 and 3 are on both; then 5 and 6 are.
TWICE = ExpertPlacement(8, 2, (0, 3, 1, 2, 4, 0, 3, 5, 6, 7))
# Copies of 5 and 6 are a run; where these are first they are in others.
OTHERS = ExpertPlacement(8, 2, (6, 4, 5, 0, 1, 2, 3, 5, 6, 7))


# ------------------------------------------------------------------------------------ what moves


def move(rank, ep, options, placements):
    """Everything before and after some moves, outputs, and local rows that a rank holds twice."""
    run = Run(rank, ep, **options)
    run.steps(0, 2)
    x, target = batch(9, rank, dist.get_world_size())
    loss_of(run.call, x, target).backward()  # Gradients of a step that has begun move too.
    before, grads = run.everything(), in_order(run, gradients(run.model))
    y = outputs(run, x)
    ids = [id(p) for p in run.model.parameters()]
    found = []
    for placement in placements:
        filled = move_experts(run.model, run.optimizer, placement)
        after = run.everything()
        assert after.keys() == before.keys()
        same = all(torch.equal(after[name], tensor) for name, tensor in before.items())
        same_grads = in_order(run, gradients(run.model))
        same &= all(torch.equal(same_grads[name], tensor) for name, tensor in grads.items())
        found.append((filled, same, float((outputs(run, x) - y).abs().max())))
        bank = run.model.layers[0].moe.experts
        assert bank.sharding.placement == bank.dispatcher.placement == placement
        rows = whole(bank.w_down)
        for place, expert in enumerate(placement.physical):
            assert torch.equal(rows[place], rows[placement.physical.index(expert)])
    assert ids == [id(p) for p in run.model.parameters()]
    return found


def outputs(run, x):
    with torch.no_grad():
        y = run.model(x)
    for module in run.model.modules():  # The outermost one keeps its weights for a backward.
        if isinstance(module, FSDPModule):
            module.reshard()
    return y


def in_order(run, tensors):
    first = list(run.model.layers[0].moe.experts.sharding.placement.first_places)
    return {n: t[first] if ".experts." in n else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("world", "ep", "options", "placements"),
    [
        (2, 2, {"fsdp": False, "dispatch": "slots"}, [NEAR, FAR, ExpertPlacement.contiguous(8, 2)]),
        (4, 4, {"fsdp": False, "dispatch": "tokens"}, [FOUR]),
        (4, 2, {"dispatch": "slots"}, [FAR, NEAR]),
        (4, 2, {"placement": TWICE, "dispatch": "tokens"}, [OTHERS, TWICE]),
        (2, 2, {"fsdp": False, "placement": TWICE}, [OTHERS]),
    ],
    ids=["ep2", "ep4", "ep2 of fsdp2", "replicas of fsdp2", "replicas"],
)
def test_weights_and_state_move_to_the_bit(processes, world, ep, options, placements):
    for found in processes.run(move, ep, options, placements, world=world):
        for filled, same, difference in found:
            assert filled > 0 and same
            assert difference <= (0 if options.get("dispatch") == "slots" else 1e-6)


def move_columns(rank, folder):
    """Fewer experts than shards: FSDP2 shards the second dimension."""
    run = Run(rank, 2, model={"experts": 2})
    run.steps(0, 1)
    before = run.everything()
    move_experts(run.model, run.optimizer, ExpertPlacement(2, 2, (1, 0)))
    run.save(folder)
    other = Run(rank, 1, seed=1, model={"experts": 2})
    other.load(folder)
    return [
        all(torch.equal(after[name], tensor) for name, tensor in before.items())
        for after in (run.everything(), other.everything())
    ]


def test_columns_of_fsdp2(processes, tmp_path):
    assert processes.run(move_columns, tmp_path / "a") == [[True, True]] * 4


# ------------------------------------------------------------------------------------- training


def train(rank, ep, options, placements):
    """Three steps with a move before each but the first."""
    run = Run(rank, ep, **options)
    losses = run.steps(0, 1)
    for step, placement in enumerate(placements, 1):
        move_experts(run.model, run.optimizer, placement)
        losses += run.steps(step, step + 1)
    # Of experts with several places all rows are still the same.
    placement = run.model.layers[1].moe.experts.sharding.placement
    rows = whole(run.model.layers[1].moe.experts.w_gate_up)
    for place, expert in enumerate(placement.physical):
        assert torch.equal(rows[place], rows[placement.physical.index(expert)])
    return losses, run.everything()


@pytest.mark.parametrize(
    ("world", "options", "placements"),
    [
        (2, {"dispatch": "slots"}, [FAR, NEAR]),
        pytest.param(4, {"dispatch": "tokens"}, [FAR, NEAR], marks=pytest.mark.full),
        (2, {"placement": TWICE}, [TWICE, OTHERS]),
        (4, {"placement": TWICE, "dispatch": "slots"}, [OTHERS, TWICE]),
    ],
    ids=["ep2", "fsdp2", "replicas", "replicas of fsdp2"],
)
def test_training_goes_on_as_without_moves(processes, world, options, placements):
    """Clipping included, which would count replicas several times."""
    plain = [ExpertPlacement.contiguous(8, 2)] * len(placements)
    still = {name: value for name, value in options.items() if name != "placement"}
    want = processes.run(train, 2, {"dispatch": "tokens", **still}, plain, world=world)
    losses, weights = want[0]
    for its_losses, got in processes.run(train, 2, options, placements, world=world):
        torch.testing.assert_close(its_losses, losses, rtol=1e-5, atol=0)
        assert_same(got, weights, rtol=1e-4)


def gradients_of_replicas(rank):
    """Not of FSDP2: what autograd itself leaves."""
    model = shard_experts(Model(), init_moe_meshes(2).ep, placement=TWICE)
    x, target = batch(0, rank, 2)
    (loss_of(model, x, target) / 2).backward()
    dense = [p for name, p in model.named_parameters() if ".experts." not in name]
    for p in dense:
        dist.all_reduce(p.grad)
    found = gradients(model)
    norm = clip_grad_norm_(model.parameters(), 0.01)
    first = list(TWICE.first_places)
    return {n: t[first] if ".experts." in n else t for n, t in found.items()}, norm


def test_gradients_of_replicas_are_those_of_one_process(processes):
    model = Model()
    loss_of(model, *batch(0)).backward()
    want = gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    for got, its_norm in processes.run(gradients_of_replicas, world=2):
        assert_same(got, want)
        torch.testing.assert_close(its_norm, norm, rtol=1e-5, atol=0)


COPIES = ExpertPlacement(8, 4, (0, 1, 2, 3, 0, 4, 5, 0, 1, 6, 7, 1))


def gradients_of_copies(rank):
    """Returns the rows sent to each rank to sum gradients, and w_down's gradient on this one."""
    sent = []

    def send_rows(x, recv, send, group):
        sent.append(send)
        return all_to_all_rows(x, recv, send, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(banks, "all_to_all_rows", send_rows)
        model = shard_experts(Model(1), init_moe_meshes(4).ep, placement=COPIES)
        (loss_of(model, *batch(0, rank, 4)) / 4).backward()
    return sent, model.layers[0].moe.experts.w_down.grad.to_local()


def test_only_ranks_with_copies_of_an_expert_exchange_its_gradient(processes):
    model = Model(1)
    loss_of(model, *batch(0)).backward()
    want = model.layers[0].moe.experts.w_down.grad
    sent, found = zip(*processes.run(gradients_of_copies), strict=True)
    assert sent == ([[0, 1, 2, 1]], [[1, 0, 1, 0]], [[2, 1, 0, 1]], [[1, 0, 1, 0]])
    rows = torch.cat(found)
    assert_same({"w_down": rows}, {"w_down": want[list(COPIES.physical)]})
    first = list(COPIES.first_places)
    for row, expert in zip(rows, COPIES.physical, strict=True):
        assert_identical(row, rows[first[expert]])


# ---------------------------------------------------------------------------------- checkpoints


def save_moved(rank, ep, options, placement, folder):
    run = Run(rank, ep, **options)
    run.steps(0, 2)
    move_experts(run.model, run.optimizer, placement)
    run.save(folder)
    return run.everything()


def load_moved(rank, ep, options, placement, folder):
    run = Run(rank, ep, seed=1, **options)
    if placement is not None:
        move_experts(run.model, run.optimizer, placement)
    run.load(folder)
    return run.everything()


def load_alone(rank, folder):
    """By torch's own means, in a model that is whole."""
    model = Model(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state["optimizer"])
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} {key}": value for key, value in optimizer.state[p].items()}
    assert optimizer.param_groups[0]["lr"] == 1e-2
    return found


def test_checkpoints_are_in_the_order_of_experts(processes, tmp_path):
    """With replicas and FSDP2, once each; read by other placements, and by one process."""
    twice = {"placement": TWICE}
    want = processes.run(save_moved, 2, twice, OTHERS, tmp_path / "a")[0]
    for world, call in (
        (4, (load_moved, 4, {}, FOUR, tmp_path / "a")),
        (2, (load_moved, 2, {**twice, "fsdp": False}, OTHERS, tmp_path / "a")),
        (2, (load_moved, 2, {}, None, tmp_path / "a")),
        (1, (load_alone, tmp_path / "a")),
    ):
        for got in processes.run(*call, world=world):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


# -------------------------------------------------------------------------------------- routing


def follow_the_load(rank):
    """From what routers chose to other places, on all ranks the same."""
    model = shard_experts(Model(), init_moe_meshes(2).ep, placement=TWICE)
    with torch.no_grad():
        for layer in model.layers:  # Two experts of rank 0 get most tokens.
            layer.moe.router.weight[1:3] *= 30
    x, _ = batch(0, rank, 2)
    stats = ExpertLoadStats()
    with record_routing(model) as record, torch.no_grad():
        y = model(x)
    for name, calls in record.layers.items():
        stats.update(calls[0].topk_ids, EXPERTS, layer=name)
    placements = plan_placements(model, stats.all_reduce())
    again = plan_placements(model, stats)
    busy = {}
    for name, new in placements.items():
        load = stats.tokens_per_expert(name.removesuffix(".experts"))
        old = model.get_submodule(name).sharding.placement
        busy[name] = old.max_violation(load), new.max_violation(load)
    filled = move_experts(model, None, placements)
    with torch.no_grad():
        difference = float((model(x) - y).abs().max())
    # The same statistics ask for nothing more.
    rest = move_experts(model, None, plan_placements(model, stats))
    return (
        {n: p.physical for n, p in placements.items()},
        again == placements,
        busy,
        filled,
        (
            difference,
            rest,
        ),
    )


def test_routing_says_where_experts_should_be(processes):
    found = processes.run(follow_the_load, world=2)
    assert found[0][0] == found[1][0]
    for _, repeated, busy, filled, (difference, rest) in found:
        assert repeated and filled > 0 and rest == 0
        assert difference < 1e-5
        for before, after in busy.values():
            assert after < before > 0.1


# ------------------------------------------------------------------------- other things of banks


def other_things(rank):
    """Surgery, quantized banks, and packed copies of a bank that has been moved."""
    torch.manual_seed(0)
    layer = build_moe(32, 32, EXPERTS, 2, bias=True)
    whole_layer = build_moe(32, 32, EXPERTS, 2, bias=True)
    whole_layer.load_state_dict(layer.state_dict())
    shard_experts(layer, init_moe_meshes(2).ep, placement=TWICE)
    move_experts(layer, None, OTHERS)
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(rank))
    found = []
    with torch.no_grad():
        for change in (
            lambda m: m.eval(),
            lambda m: m.select([5, 0, 3, 6]),
            lambda m: m.select([7, 6, 5, 4, 3, 2, 1, 0]),
        ):
            found.append(torch.allclose(change(layer)(x), change(whole_layer)(x), atol=1e-5))
        layer.pack_weights()
        layer(x)
        move_experts(layer, None, TWICE)
        found.append(torch.allclose(layer(x), whole_layer(x), atol=1e-5))
        for model in (layer, whole_layer):
            moe_ops.quantize(model, moe_ops.Int8WeightConfig())
        for placement in (TWICE, OTHERS):
            move_experts(layer, None, placement)
            found.append(torch.allclose(layer(x), whole_layer(x), atol=1e-5))
    return found


def test_other_things_of_banks_that_have_moved(processes):
    assert processes.run(other_things, world=2) == [[True] * 6] * 2


# ------------------------------------------------------------------------------- wrong arguments


def refused(rank):
    run = Run(rank, 2)
    run.steps(0, 1)
    before = run.everything()
    said = []

    def record(call):
        try:
            call()
            said.append("no error")
        except ValueError as error:
            said.append(str(error))

    model, optimizer = run.model, run.optimizer
    record(lambda: move_experts(nn.Linear(2, 2), None, FAR))
    record(lambda: move_experts(model, optimizer, {"layers.0": FAR}))
    record(lambda: move_experts(model, optimizer, ExpertPlacement.contiguous(10, 2)))
    record(lambda: move_experts(model, optimizer, TWICE))
    bank = model.layers[1].moe.experts
    state = optimizer.state[bank.w_down]
    mine, state["exp_avg"] = state["exp_avg"], state["exp_avg"].to_local()
    record(lambda: move_experts(model, optimizer, FAR))
    state["exp_avg"] = mine
    dispatcher, bank.dispatcher = bank.dispatcher, print
    record(lambda: move_experts(model, optimizer, FAR))
    bank.dispatcher = dispatcher
    record(lambda: plan_placements(model, ExpertLoadStats()))
    ep = init_moe_meshes(2).ep
    record(lambda: shard_experts(Experts(8, 16, 8), ep, placement=FOUR))
    record(lambda: shard_experts(Experts(7, 16, 8), ep, placement=ExpertPlacement.contiguous(7, 2)))
    record(lambda: shard_experts(Experts(6, 16, 8), ep, placement=FAR))
    after = run.everything()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return said


def test_what_cannot_be_done_is_said(processes):
    for said in processes.run(refused, world=2):
        for text, beginning in zip(
            said,
            [
                "move_experts: model must hold experts of shard_experts, got Linear",
                "move_experts: placement must be for banks of the model (layers.0.moe.experts, ",
                "move_experts: placement of layers.0.moe.experts must have 8 experts on 2 ranks "
                "in 8",
                "move_experts: placement of layers.0.moe.experts must have 8 experts on 2 ranks "
                "in 8",
                "move_experts: exp_avg that the optimizer keeps of w_down of layers.1.moe.experts ",
                "move_experts: the dispatcher of layers.1.moe.experts must have set_placement, got",
                "plan_placements: stats must have counts of layers.0.moe.experts, or of the ",
                "shard_experts: placement must have no empty place and be for 2 ranks, got",
                "shard_experts: placement must have no empty place and be for 2 ranks, got",
                "shard_experts: placement must be of the 6 experts of the model, got one of 8.",
            ],
            strict=True,
        ):
            assert text.startswith(beginning), text

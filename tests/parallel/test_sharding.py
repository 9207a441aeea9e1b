"""Sharded experts beside FSDP2 and DDP: gradients, norms and steps equal those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from moe_ops.layers import Experts
from moe_ops.parallel import (
    ExpertPlacement,
    clip_grad_norm_,
    fully_shard_moe,
    init_moe_meshes,
    prepare_ddp,
    shard_experts,
)

from .common import (
    EXPERTS,
    HIDDEN,
    Model,
    assert_same,
    batch,
    gradients,
    loss_of,
    mean_over_ranks,
    parameters,
)

pytestmark = pytest.mark.cpu_only


def sharded_model(meshes, **options):
    model = shard_experts(Model(**options), meshes.ep)
    for block in model.layers:
        fully_shard_moe(block, meshes.dp, meshes.efsdp)
    return fully_shard(model, mesh=meshes.dp)


# ------------------------------------------------------------------------------------- FSDP2


def fsdp_step(rank, ep, micro_batches):
    meshes = init_moe_meshes(ep)
    model = sharded_model(meshes)
    for i in range(micro_batches):
        model.set_requires_gradient_sync(i == micro_batches - 1)
        x, target = batch(i, rank, dist.get_world_size())
        (loss_of(model, x, target) / micro_batches).backward()
    norm = clip_grad_norm_(model.parameters(), 0.01)
    return gradients(model), norm


def one_process_step(micro_batches, max_norm=0.01):
    model = Model()
    for i in range(micro_batches):
        (loss_of(model, *batch(i)) / micro_batches).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return gradients(model), norm


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_fsdp_gradients_and_norm_are_those_of_one_process(processes, ep, micro_batches):
    want, norm = one_process_step(micro_batches)
    for got, its_norm in processes.run(fsdp_step, ep, micro_batches):
        assert_same(got, want)
        torch.testing.assert_close(its_norm, norm, rtol=1e-5, atol=0)


def fewer_experts_than_ranks(rank):
    meshes = init_moe_meshes(1)
    torch.manual_seed(0)
    experts = shard_experts(Experts(2, HIDDEN, 8, bias=True), meshes.ep)
    fully_shard_moe(experts, meshes.dp, meshes.efsdp)
    local = [p.to_local().shape for p in experts.parameters()]
    x, _ = batch(0, rank, 4)
    ids = torch.arange(12)[:, None] % 2
    experts(x, torch.ones(12, 1), ids).square().mean().backward()
    return local, gradients(experts)


def test_experts_that_are_fewer_than_ranks_are_cut_across(processes):
    torch.manual_seed(0)
    experts = Experts(2, HIDDEN, 8, bias=True)
    x, _ = batch(0)
    experts(x, torch.ones(48, 1), torch.arange(48)[:, None] % 2).square().mean().backward()
    for local, got in processes.run(fewer_experts_than_ranks):
        assert [shape[:2] for shape in local] == [(2, 4), (2, 4), (2, 4), (2, 4)]
        assert_same(got, gradients(experts))


def mixed_precision(rank):
    meshes = init_moe_meshes(2)
    model = shard_experts(Model(), meshes.ep)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard_moe(block, meshes.dp, meshes.efsdp, mp_policy=policy)
    fully_shard(model, mesh=meshes.dp, mp_policy=policy)
    given = []
    for bank in (m for m in model.modules() if isinstance(m, Experts)):
        bank.register_forward_pre_hook(lambda _, args: given.append([t.dtype for t in args[:2]]))
    x, target = batch(0, rank, 4)
    loss_of(model, x, target).backward()
    assert given and all(dtypes == [torch.bfloat16, torch.float32] for dtypes in given), given
    return gradients(model)


def test_fsdp_in_bfloat16(processes):
    want, _ = one_process_step(1, float("inf"))
    for got in processes.run(mixed_precision):
        for name, tensor in want.items():
            ratio = float((got[name] * tensor).sum() / tensor.square().sum())
            assert abs(ratio - 1) < 0.1, f"{name}: {ratio}"


def float16_with_one_shard(rank):
    meshes = init_moe_meshes(2)
    model = shard_experts(Model(1), meshes.ep)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float16)
    try:
        fully_shard_moe(model, meshes.dp, meshes.efsdp, mp_policy=policy)
    except ValueError as error:
        return str(error)


def test_a_reduction_that_would_divide_twice_is_refused(processes):
    said = processes.run(float16_with_one_shard, world=2)
    assert said[0].startswith("fully_shard_moe: gradients must be reduced in float32")


# --------------------------------------------------------------------------------------- DDP


def ddp_step(rank, ep, micro_batches):
    meshes = init_moe_meshes(ep)
    # DDP makes the rest of the ranks equal; experts have to be so.
    model = shard_experts(Model(), meshes.ep)
    with torch.no_grad():
        model.head.weight.add_(rank)
    prepare_ddp(model, efsdp_mesh=meshes.efsdp)
    model = DistributedDataParallel(model)
    for i in range(micro_batches):
        x, target = batch(i, rank, dist.get_world_size())
        with model.no_sync() if i < micro_batches - 1 else torch.enable_grad():
            (loss_of(model, x, target) / micro_batches).backward()
    norm = clip_grad_norm_(model.parameters(), 0.01)
    return gradients(model), norm, parameters(model)


@pytest.mark.parametrize(("ep", "micro_batches"), [(4, 1), (2, 1), (2, 2)])
def test_ddp_gradients_and_norm_are_those_of_one_process(processes, ep, micro_batches):
    want, norm = one_process_step(micro_batches)
    weights = parameters(Model())
    for got, its_norm, its_weights in processes.run(ddp_step, ep, micro_batches):
        assert_same(got, want)
        torch.testing.assert_close(its_norm, norm, rtol=1e-5, atol=0)
        assert all(torch.equal(its_weights[name], w) for name, w in weights.items())


def ddp_of_a_bank(rank):
    meshes = init_moe_meshes(2)
    torch.manual_seed(0)
    bank = torch.nn.Sequential(torch.nn.Linear(2, 2), Experts(EXPERTS, HIDDEN, 8))
    shard_experts(bank, meshes.ep)
    said = []
    for call in (
        lambda: prepare_ddp(bank),
        lambda: prepare_ddp(torch.nn.Linear(2, 2)),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def test_ddp_ignore_says_what_it_needs(processes):
    (said, *_) = processes.run(ddp_of_a_bank)
    assert said[0] == (
        "prepare_ddp: efsdp_mesh must hold the 2 ranks that have the same experts, got 1."
    )
    assert said[1].startswith("prepare_ddp: model must hold experts of shard_experts, got Linear")


# ----------------------------------------------------------------------------- the whole way


def train(rank, ep, steps):
    meshes = init_moe_meshes(ep)
    model = sharded_model(meshes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    losses = []
    for step in range(steps):
        x, target = batch(step, rank, dist.get_world_size())
        loss = loss_of(model, x, target)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(mean_over_ranks(loss))
    return losses


def test_steps_have_the_losses_of_one_process(processes):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    want = []
    for step in range(5):
        loss = loss_of(model, *batch(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        want.append(float(loss.detach()))
    assert want[-1] < want[0]
    for ep in (1, 2, 4):
        for losses in processes.run(train, ep, 5):
            torch.testing.assert_close(losses, want, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------- shapes and errors


def layout(rank):
    meshes = init_moe_meshes(2, tp=2)
    model = shard_experts(Model(1), meshes.ep)
    bank = model.layers[0].moe.experts
    meta = torch.nn.Sequential(Experts(EXPERTS, HIDDEN, 8, device="meta"))
    shard_experts(meta, meshes.ep)
    meta.to_empty(device="cpu")
    said = []
    for call in (
        lambda: init_moe_meshes(3),
        lambda: init_moe_meshes(2, tp=0),
        lambda: shard_experts(torch.nn.Linear(2, 2), meshes.ep),
        lambda: shard_experts(Experts(3, 4, 4), meshes.ep),
        lambda: shard_experts(model, meshes.ep),
        lambda: shard_experts(
            Model(1), meshes.ep, placement=ExpertPlacement.contiguous(EXPERTS, 4)
        ),
        lambda: shard_experts(
            Model(1), torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        ),
    ):
        try:
            call()
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
    return {
        "sizes": [mesh.size() for mesh in meshes],
        "ranks": [mesh.mesh.tolist() for mesh in meshes],
        "experts": bank.num_experts,
        "shape": bank.w_gate_up.shape,
        "local": bank.w_gate_up.detach().to_local(),
        "sharded": isinstance(bank.w_down, DTensor) and bank.w_down.placements == (Shard(0),),
        "names": [name for name, _ in model.named_parameters()],
        "meta": meta[0].w_down.to_local().shape,
        "said": said,
    }


def test_each_rank_has_its_experts(processes):
    model = Model(1)
    want = model.layers[0].moe.experts.w_gate_up.detach()
    for rank, got in enumerate(processes.run(layout)):
        first = rank % 2 * EXPERTS // 2
        assert torch.equal(got["local"], want[first : first + EXPERTS // 2])
        assert got["sizes"] == [2, 2, 2, 2]
        assert got["ranks"][1] == ([0, 1] if rank < 2 else [2, 3])
        assert got["ranks"][2] == ([0, 2] if rank % 2 == 0 else [1, 3])
        assert got["experts"] == EXPERTS
        assert got["shape"] == want.shape
        assert got["sharded"]
        assert got["names"] == [name for name, _ in model.named_parameters()]
        assert got["meta"] == (EXPERTS // 2, HIDDEN, 8)
        assert [text.split(":")[0] for text in got["said"]] == ["init_moe_meshes"] * 2 + [
            "shard_experts"
        ] * 5
        assert got["said"][0] == "init_moe_meshes: ep must divide the 4 ranks, got 3."
        assert "got Linear without one" in got["said"][2]
        assert "got 3 in the model" in got["said"][3]
        assert "got a bank that is sharded" in got["said"][4]
        assert "placement must have no empty place and be for 2 ranks" in got["said"][5]
        assert "got (2, 2)" in got["said"][6]

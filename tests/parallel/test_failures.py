"""Wrong and failing ranks: every other rank ends with an error, in time, that says what differs."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tests.helpers.processes import RankError

from moe_ops._private_torch import timeout_of
from moe_ops.parallel import (
    ExpertPlacement,
    fully_shard_moe,
    init_moe_meshes,
    make_dispatcher,
    shard_experts,
)
from moe_ops.quant import Int8WeightConfig, quantize

from .common import Model, Run, assert_same

pytestmark = pytest.mark.cpu_only

TIMEOUT = 6.0


def timeouts(rank, given):
    meshes = init_moe_meshes(2, timeout=given)
    return [timeout_of(mesh.get_group()).total_seconds() for mesh in meshes]


def test_meshes_have_the_timeout_of_the_process_group(processes):
    assert processes.run(timeouts, None, timeout=TIMEOUT) == [[TIMEOUT] * 4] * 4
    assert processes.run(timeouts, timedelta(seconds=9), timeout=TIMEOUT) == [[9.0] * 4] * 4


def step_with_a_failure(rank, how):
    """Rank 1 fails after a step. Returns what the rank raised in the next step, and its seconds."""
    run = Run(rank, 2)
    run.steps(0, 1)
    start = time.monotonic()
    if rank == 1 and how == "freezes":
        time.sleep(2.5 * TIMEOUT)
        return "", 0.0
    if rank == 1 and how == "returns":
        return "", 0.0
    if rank == 1:
        os._exit(3)
    try:
        run.steps(1, 2)
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.parametrize("how", ["freezes", "returns"])
def test_a_lost_rank_ends_the_others_in_time(processes, how):
    for rank, (error, seconds) in enumerate(
        processes.run(step_with_a_failure, how, timeout=TIMEOUT)
    ):
        assert rank == 1 or (error and seconds < 2 * TIMEOUT)


def test_a_dead_rank_ends_the_others(processes):
    start = time.monotonic()
    with pytest.raises(RankError, match="it ended with 3"):
        processes.run(step_with_a_failure, "dies", timeout=TIMEOUT)
    assert time.monotonic() - start < 60


def disagree(rank, how):
    """Rank 1 gives shard_experts something else. Returns the error."""
    torch.manual_seed(0)
    odd = rank == 1
    model = Model(1, seed=3 if how == "seed" and odd else 0)
    options = {}
    if how == "experts":
        model = Model(1, experts=16 if odd else 8)
    if how == "dtype" and odd:
        model.bfloat16()
    if how == "format":
        quantize(model, Int8WeightConfig())
        if odd:
            model.layers[0].moe.experts.w_down[0].zero_()
    if how == "dispatch":
        options["dispatch"] = "slots" if odd else "tokens"
    if how == "option":
        options = {"dispatch": "slots", **({"fp8": True} if odd else {})}
    if how == "placement" and odd:
        options["placement"] = ExpertPlacement(8, 2, (7, 6, 5, 4, 3, 2, 1, 0))
    mesh = init_moe_meshes(2).ep
    try:
        shard_experts(model, mesh, **options)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ("seed", "layers.0.dense.weight must be equal .* checksum"),
        ("experts", r"router.weight .* \[8, 16\] .* \[16, 16\]"),
        ("dtype", "layers.0.norm.weight .* float32 .* bfloat16"),
        ("format", "w_down .* int8"),
        ("dispatch", "dispatch must be equal .* 'tokens' on rank 0 and 'slots'"),
        ("option", "fp8 must be equal .* none on rank 0 and True"),
        ("placement", "placement must be equal .* None"),
    ],
)
def test_ranks_that_disagree_are_named(processes, how, field):
    for error in processes.run(disagree, how, world=2):
        assert "shard_experts: " in error
        assert "on rank 1 of the group." in error
        assert re.search(field, error)


def places_of_some(rank):
    """Six experts, two of them twice, on four ranks."""
    placement = ExpertPlacement(6, 4, (0, 1, 2, 3, 4, 5, 0, 1))
    run = Run(rank, 4, model={"experts": 6}, placement=placement)
    return run.steps(0, 3), run.everything()


def alone(rank):
    run = Run(rank, 1, model={"experts": 6})
    return run.steps(0, 3), run.everything()


def test_a_placement_of_experts_that_ranks_do_not_divide(processes):
    losses, want = processes.run(alone, world=4)[0]
    for got, weights in processes.run(places_of_some):
        assert got == pytest.approx(losses, rel=1e-5)
        assert_same(weights, want, rtol=1e-3)


def said(rank):
    meshes = init_moe_meshes(2)
    model = shard_experts(Model(1), meshes.ep)
    calls = [
        lambda: shard_experts(Model(1), None),
        lambda: shard_experts(Model(1), meshes.ep, "gather", fp8=True),
        lambda: make_dispatcher(meshes.ep, 8, dispatch="slots", precision=8),
        lambda: fully_shard_moe(model.layers[0], meshes.efsdp, meshes.dp),
    ]
    found = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        found.append(str(error.value))
    dist.barrier()
    return found


def test_wrong_arguments_are_said(processes):
    for mesh, gather, option, swapped in processes.run(said):
        assert "ep_mesh must be a mesh, such as init_moe_meshes(ep).ep, got None" in mesh
        assert "options must be those of 'gather'" in gather and "got fp8" in gather
        assert "got precision" in option
        assert "efsdp_mesh must have one rank of those that share" in swapped

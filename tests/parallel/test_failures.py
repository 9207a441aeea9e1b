"""Wrong and failing ranks: every other rank ends with an error, in time, that says what differs."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tests.helpers.processes import RankError
from torch.distributed.checkpoint import FileSystemWriter

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


def at_a_point(run, where, fail):
    """Makes a rank call `fail` the next time that its run reaches a point."""
    experts = run.model.layers[1].moe.experts
    compute = experts.forward_local

    def failing(*args, **options):
        if where == "in its experts":
            fail()
        y = compute(*args, **options)
        y.register_hook(lambda grad: fail())
        return y

    if where == "before a step":
        fail()
    elif where in ("in its experts", "in backward"):
        experts.forward_local = failing
    elif where == "in the optimizer":
        run.optimizer.register_step_pre_hook(lambda *_: fail())
    elif where == "while saving":
        FileSystemWriter.write_data = lambda *_: fail()
    else:
        raise ValueError(where)


def end_by_signal(number):
    os.kill(os.getpid(), number)


def fail_with(error):
    raise error


HOW = {
    "raises": lambda: fail_with(ArithmeticError("of rank 1")),
    "leaves": lambda: fail_with(Left()),
    "freezes": lambda: time.sleep(2 * TIMEOUT),
    "exits": lambda: os._exit(3),
    "is killed": lambda: end_by_signal(signal.SIGKILL),
    "is stopped": lambda: end_by_signal(signal.SIGSTOP),
}
# What the pool of processes reports of rank 1; a frozen rank wakes up among lost peers, and a
# stopped one never answers.
FAILURES = {
    ("raises", "before a step"): "of rank 1",
    ("raises", "in its experts"): "of rank 1",
    ("raises", "in backward"): "of rank 1",
    ("leaves", "before a step"): "",
    ("freezes", "before a step"): "Error",
    ("freezes", "in its experts"): "Error",
    ("exits", "in the optimizer"): "it ended with 3",
    ("is killed", "in its experts"): "it ended with -9",
    ("is killed", "while saving"): "it ended with -9",
    ("is stopped", "in backward"): "",
}


class Left(Exception):
    """A rank goes on without the others, after it ended its process group."""


def run_with_a_failure(rank, how, where, folder):
    """Rank 1 fails in the second step. Every other rank writes the seconds until its error."""
    run = Run(rank, 2)
    run.steps(0, 1)
    start = time.monotonic()
    try:
        if rank == 1:
            at_a_point(run, where, HOW[how])
        run.steps(1, 2)
        run.save(folder / "checkpoint")
    except Left:
        return
    except Exception:
        (folder / str(rank)).write_text(str(time.monotonic() - start))
        raise


@pytest.mark.parametrize("_", range(int(os.environ.get("MOE_OPS_FAILURE_REPEATS", "1"))))
@pytest.mark.parametrize(("how", "where"), FAILURES, ids=map(" ".join, FAILURES))
def test_a_failing_rank_ends_the_others_in_time(
    processes, tmp_path, record_property, how, where, _
):
    """MOE_OPS_FAILURE_REPEATS=20 runs each kind of failure 20 times."""
    with pytest.raises(RankError) as error:
        processes.run(run_with_a_failure, how, where, tmp_path, timeout=TIMEOUT)
    assert FAILURES[how, where] in error.value.ranks.get(1, "")
    assert error.value.ranks.keys() >= {0, 2, 3}
    seconds = [float((tmp_path / str(rank)).read_text()) for rank in (0, 2, 3)]
    record_property("seconds", max(seconds))
    assert max(seconds) < 1.5 * TIMEOUT


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

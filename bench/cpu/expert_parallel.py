"""Overhead of an expert-parallel step beyond computation and communication: ``python -m
bench.cpu.expert_parallel``.

Two gloo processes on this machine train experts, forward and backward, with one thread and one core
each, their own tokens and random routing. Both processes run these jobs in turn:

    compute  the same tokens with all experts in each process: nothing is sent
    gloo     the collectives of the step alone, one after the other, of the same sizes and types
    step     half of the experts in each process, and a dispatcher

The time of a round is the slower process's. `cost` is the median over rounds of step / (compute +
gloo), with a target of at most 1.15. It uses wall time, since gloo waits: measure on an otherwise
idle machine. `cpu cost` is the ratio of the CPU time of both processes, including gloo's threads,
which other work on the machine affects little. glibc is set to keep freed memory: whether it would
return and fetch it again depends on sizes by chance.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness.arguments import whole
from moe_ops.bench.report import number, table
from moe_ops.bench.timing import interleave
from moe_ops.layers import Experts
from moe_ops.parallel import init_moe_meshes, shard_experts

RANKS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCKS = (time.perf_counter, time.process_time)
JOBS = ("compute", "gloo", "step")


class Collectives(TorchDispatchMode):
    """Records the collectives that are started, as calls that repeat them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "_c10d_functional" and name != "wait_tensor":
            x = torch.zeros_like(args[0])
            self.num_bytes += x.numel() * x.element_size()
            self.calls.append(_repeated(name, x, args[1:]))
        return func(*args, **(kwargs or {}))


def _repeated(name: str, x: Tensor, rest: Any) -> Callable[[], object]:
    if name == "all_to_all_single":
        recv, send = list(rest[0]), list(rest[1])
        y = x.new_empty(sum(recv), *x.shape[1:])
        return lambda: dist.all_to_all_single(y, x, recv, send)
    if name == "all_gather_into_tensor":
        y = x.new_empty(RANKS * x.shape[0], *x.shape[1:])
        return lambda: dist.all_gather_into_tensor(y, x)
    if name == "reduce_scatter_tensor":
        y = x.new_empty(x.shape[0] // RANKS, *x.shape[1:])
        return lambda: dist.reduce_scatter_tensor(y, x)
    if name == "all_reduce":
        return lambda: dist.all_reduce(x)
    raise AssertionError(f"A step sends nothing by {name}.")


def _jobs(
    rank: int, sizes: argparse.Namespace, dispatch: str
) -> tuple[dict[str, Callable[[], object]], int]:
    """Returns the timed jobs, and the bytes that one rank passes to collectives in a step."""
    torch.manual_seed(0)
    h, i, e, k = sizes.hidden, sizes.intermediate, sizes.experts, sizes.top_k
    dtype = DTYPES[sizes.dtype]
    alone, parallel = (Experts(e, h, i, dtype=dtype) for _ in range(2))
    shard_experts(parallel, init_moe_meshes(RANKS).ep, dispatch)
    generator = torch.Generator().manual_seed(rank)
    x, grad = (torch.randn(sizes.tokens, h, generator=generator).to(dtype) for _ in range(2))
    ids = torch.rand(sizes.tokens, e, generator=generator).topk(k).indices
    weights = torch.rand(sizes.tokens, k, generator=generator)

    def step(bank: Experts) -> None:
        bank.zero_grad()
        inputs = x.detach().requires_grad_(), weights.detach().requires_grad_()
        bank(*inputs, ids).backward(grad)

    step(parallel)
    with Collectives() as collected:
        step(parallel)

    def send() -> None:
        for call in collected.calls:
            call()

    jobs = {"compute": lambda: step(alone), "gloo": send, "step": lambda: step(parallel)}
    return jobs, collected.num_bytes


def _profile(rank: int, jobs: dict[str, Callable[[], object]], rounds: int) -> None:
    """Prints a profile of a step on rank 0."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            jobs["step"]()
    if rank == 0:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


def run_rank(rank: int, folder: str, sizes: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one result per dispatcher, equal on all ranks."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS)
    lines = []
    for dispatch in sizes.dispatch:
        jobs, num_bytes = _jobs(rank, sizes, dispatch)
        if sizes.profile:
            _profile(rank, jobs, sizes.rounds)
            continue

        seconds: dict[str, list[list[float]]] = {name: [] for name in jobs}

        def sample(
            name: str,
            _: int,
            jobs: dict[str, Callable[[], object]] = jobs,
            seconds: dict[str, list[list[float]]] = seconds,
        ) -> None:
            dist.barrier()
            start = [clock() for clock in CLOCKS]
            for _ in range(sizes.repeats):
                jobs[name]()
            seconds[name].append(
                [
                    (clock() - then) / sizes.repeats
                    for clock, then in zip(CLOCKS, start, strict=True)
                ]
            )

        interleave(list(jobs), sample, lambda number: number < sizes.rounds + 1)
        # The first round warms up. The wall time of a round is the slower rank's.
        times = torch.tensor([seconds[name][1:] for name in JOBS], dtype=torch.float64)
        wall, on_core = (times[..., i].contiguous() for i in range(2))
        dist.all_reduce(wall, dist.ReduceOp.MAX)
        dist.all_reduce(on_core)
        costs = [(t[2] / (t[0] + t[1])).median().item() for t in (wall, on_core)]
        medians = {
            f"{name} {what}": 1e3 * row.median().item()
            for what, t in (("ms", wall), ("cpu", on_core / RANKS))
            for name, row in zip(JOBS, t, strict=True)
        }
        named = dict(zip(("cost", "cpu cost"), costs, strict=True))
        lines.append({"dispatch": dispatch, "kilobytes": num_bytes / 1e3, **medians, **named})
    dist.destroy_process_group()
    if rank == 0 and lines:
        rows = [[line["dispatch"], *(number(v) for v in list(line.values())[1:])] for line in lines]
        print(table(list(lines[0]), rows))
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.expert_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, value in (
        ("tokens", 2048),
        ("hidden", 1024),
        ("intermediate", 512),
        ("experts", 16),
        ("top-k", 4),
        ("rounds", 15),
        ("repeats", 1),
    ):
        parser.add_argument(f"--{name}", type=whole(1, 1 << 20), default=value)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--dispatch", nargs="+", default=["slots", "tokens", "gather"])
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes")
    sizes = parser.parse_args(arguments)
    os.environ.update(MALLOC_TRIM_THRESHOLD_=str(1 << 31), MALLOC_MMAP_THRESHOLD_=str(1 << 31))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (folder, sizes), nprocs=RANKS)


if __name__ == "__main__":
    main()

"""Time in turns and peak memory of a claim's arms, on the CPU.

Weights are random. Every sample of a module has a new random input, so that tokens have other
experts, and the modules of all arms take turns, so that no module finds its weights in a cache
unless they fit in it beside those of the others.
"""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_ops.bench.timing import interleave

from .claims import CLAIMS, Claim, Modules
from .count import example, total

SCALE = 0.02  # Standard deviation of weights.
MIN_ROUNDS, MAX_ROUNDS, WARM_ROUNDS = 9, 101, 3


def materialize(modules: Modules, *, training: bool) -> None:
    """Gives modules on the meta device random weights on the CPU; norms are 1, buffers 0."""
    for module in modules.values():
        module.to_empty(device="cpu").eval()
    noise = torch.randn(1 << 20) * SCALE
    for module in modules.values():
        for name, parameter in module.named_parameters():
            fill(parameter, noise, constant="norm" in name)
            parameter.requires_grad_(training)
        for buffer in module.buffers():
            buffer.zero_()


@torch.no_grad()
def fill(parameter: nn.Parameter, noise: torch.Tensor, *, constant: bool) -> None:
    if constant and parameter.dim() == 1:
        parameter.fill_(1.0)
        return
    flat = parameter.view(-1)
    for start in range(0, len(flat), len(noise)):
        part = flat[start : start + len(noise)]
        part.copy_(noise[: len(part)])


def run(module: Any, x: torch.Tensor, *, training: bool) -> None:
    if not training:
        with torch.no_grad():
            module(x)
        return
    module(x.requires_grad_()).sum().backward()
    for parameter in module.parameters():
        parameter.grad = None


def made(claim: Claim, names: set[str], folder: Path | None = None) -> Modules:
    """Builds and prepares the modules with these names."""
    with torch.device("meta"):
        modules = claim.build()
    modules = {name: m.to(claim.dtype) for name, m in modules.items() if name in names}
    materialize(modules, training=claim.training)
    return claim.prepare(modules, folder)


def names_run(claim: Claim) -> set[str]:
    return {name for arm in claim.arms.values() for _, name in arm.runs}


def measure_time(claim: Claim, budget_s: float) -> dict[str, Any]:
    """Returns the rounds, the median seconds of each arm, and the ratios to the baseline by scene.

    A ratio is the median over rounds, with its interval of 95 %.

    Args:
        budget_s: seconds for a scene; `MIN_ROUNDS` may exceed it.
    """
    modules = made(claim, names_run(claim))
    found: dict[str, Any] = {}
    for scene, lead in claim.scenes.items():
        rounds = take_turns(claim, modules, lead, budget_s)
        seconds = {
            name: [total(arm.runs, row) for row in rounds] for name, arm in claim.arms.items()
        }
        base = seconds[claim.baseline]
        found[scene] = {
            "rounds": len(rounds),
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "ratio": {
                name: interval([a / b for a, b in zip(seconds[name], base, strict=True)])
                for name in claim.others
            },
        }
    return found


def take_turns(
    claim: Claim, modules: Modules, lead: tuple[int, ...], budget_s: float
) -> list[dict[str, float]]:
    """Returns the seconds of every module, by round."""
    rounds: list[dict[str, float]] = []
    names = sorted(names_run(claim))
    end = math.inf

    def sample(name: str, number: int) -> None:
        x = example(modules[name], lead, dtype=claim.dtype)
        start = time.perf_counter()
        run(modules[name], x, training=claim.training)
        seconds = time.perf_counter() - start
        if number >= WARM_ROUNDS:
            while len(rounds) <= number - WARM_ROUNDS:
                rounds.append({})
            rounds[-1][name] = seconds

    def more(number: int) -> bool:
        nonlocal end
        if number == WARM_ROUNDS:
            end = time.perf_counter() + budget_s
        done = number - WARM_ROUNDS
        return done < MIN_ROUNDS or (done < MAX_ROUNDS and time.perf_counter() < end)

    gc.collect()
    gc.disable()
    try:
        interleave(names, sample, more)
    finally:
        gc.enable()
    return rounds


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median and the ends of its interval of at least 95 %, which are order statistics.

    Raises:
        ValueError: fewer than 6 values, whose whole range is less than that.
    """
    number = len(values)
    if number < 6:
        raise ValueError(f"interval: values must be at least 6, got {number}.")
    ordered = sorted(values)
    outside, place = 0.5**number, 0
    while 2 * (outside + math.comb(number, place + 1) * 0.5**number) <= 0.05:
        place += 1
        outside += math.comb(number, place) * 0.5**number
    return statistics.median(ordered), ordered[place], ordered[-1 - place]


# ----------------------------------------------------------------------------------- peak memory


def measure_peak(claim: Claim) -> dict[str, int]:
    """Returns the peak bytes of each arm, each in a new process, in the claim's first scene."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for arm in claim.peak_arms or claim.arms:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[arm] = pool.submit(peak_of, claim.name, arm).result()
    return found


def peak_of(claim_name: str, arm_name: str) -> int:
    """Returns by how much this process's resident memory grows at most: weights of the arm and
    what a pass needs, and with training the gradients."""
    claim = CLAIMS[claim_name]
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # Starts the threads.
    before = status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        modules, idle = held(claim, arm_name, Path(folder))
        lead = next(iter(claim.scenes.values()))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # The peak is from here on.
        losses = []
        for module in modules:
            x = example(module, lead, dtype=claim.dtype)
            if claim.training:
                losses.append(module(x.requires_grad_()).sum())
            else:
                for _ in range(WARM_ROUNDS):  # Experts may be packed after some calls.
                    run(module, x, training=False)
        if losses:
            torch.stack(losses).sum().backward()
            for module in idle:
                for parameter in module.parameters():
                    parameter.grad = torch.zeros_like(parameter)
        return status("VmHWM") - before


def held(claim: Claim, arm_name: str, folder: Path) -> tuple[list[Any], list[nn.Module]]:
    """Returns the modules of an arm that run, and those that only take memory.

    Of a whole model there are as many copies as the model has; otherwise one of each.
    """
    arm = claim.arms[arm_name]
    ran = {name for _, name in arm.runs}
    if not claim.whole:
        modules = made(claim, {*ran, *claim.needs}, folder)
        return [modules[name] for name in sorted(ran)], []
    with torch.device("meta"):
        built = claim.build()
    copies = [
        (name, copy.deepcopy(built[name]).to(claim.dtype))
        for count, name in arm.holds or arm.runs
        for _ in range(round(count))
    ]
    materialize({str(i): m for i, (_, m) in enumerate(copies)}, training=claim.training)
    return [m for n, m in copies if n in ran], [m for n, m in copies if n not in ran]


def status(field: str) -> int:
    """Returns bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"status: field must be in /proc/self/status, got {field!r}.")

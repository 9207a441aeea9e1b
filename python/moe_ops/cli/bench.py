"""``moe-ops bench``: the fused expert block against what a PyTorch user would write instead.

All contenders run in one process, in turns, so that a change of the machine's speed meets all of
them; every time is a median over rounds and every ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from moe_ops.ops import moe_ffn, topk_router

Block = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

_MIN_ROUNDS = 3
_MAX_ROUNDS = 60


@dataclass(frozen=True)
class Case:
    """T tokens of width H through E experts of width I, K experts a token."""

    name: str
    T: int
    H: int
    I: int
    E: int
    K: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T{self.T} H{self.H} I{self.I} E{self.E} K{self.K} {dtype}"


QUICK = [
    Case("demo model", 4096, 128, 128, 8, 2),
    Case("large experts", 1024, 512, 1024, 8, 2),
    Case("many small experts", 1024, 512, 128, 64, 8),
    Case("decoding", 8, 512, 512, 32, 4),
    Case("many small experts", 256, 512, 128, 64, 8, torch.bfloat16),
]
FULL = [
    *QUICK[:3],
    Case("decoding", 1, 1024, 512, 64, 8),
    Case("decoding", 8, 1024, 512, 64, 8),
    Case("decoding", 64, 1024, 512, 64, 8),
    Case("prefill", 2048, 1024, 512, 64, 8),
    Case("large experts", 2048, 1024, 2048, 8, 2),
    Case("large experts", 512, 512, 1024, 8, 2, torch.bfloat16),
    Case("many small experts", 512, 512, 128, 64, 8, torch.bfloat16),
]


def loop_over_experts(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """The usual PyTorch loop: gather an expert's tokens, two products, add back.

    The weights are unbound once: indexing them in the loop, as is often seen, makes the backward
    pass add a gradient of the size of all experts for every single one.
    """
    y = torch.zeros_like(x)
    weights = zip(w_gate_up.unbind(), w_down.unbind(), strict=True)
    for expert, (gate_up, down) in enumerate(weights):
        token, slot = torch.where(topk_ids == expert)
        if token.numel() == 0:
            continue
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down)
        y.index_add_(0, token, (out * topk_weights[token, slot, None]).to(y.dtype))
    return y


def torch_grouped_mm(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """Sort by expert and use torch.nn.functional.grouped_mm."""
    num_tokens, top_k = topk_ids.shape
    order = topk_ids.flatten().argsort(stable=True)
    counts = torch.bincount(topk_ids.flatten(), minlength=w_gate_up.shape[0])
    ends = counts.cumsum(0).to(torch.int32)
    rows = x[order // top_k]
    gate, up = F.grouped_mm(rows, w_gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    out = out * topk_weights.flatten()[order, None]
    slots = torch.empty_like(out).index_copy(0, order, out)
    return slots.view(num_tokens, top_k, -1).sum(1).to(x.dtype)


CONTENDERS: dict[str, Block] = {
    "loop": loop_over_experts,
    "grouped_mm": torch_grouped_mm,
    "moe_ops": moe_ffn,
}


def run(
    *, quick: bool, threads: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Measure every case; the result is what ``--json`` prints. Times are seconds."""
    if threads is not None:
        torch.set_num_threads(threads)
    cases, budget = (QUICK, 4.0) if quick else (FULL, 12.0)
    results = []
    for case in cases:
        if console is not None:
            console.print(f"  {case.name}: {case.shape}", style="dim")
        results.append(measure(case, budget_s=budget))
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_isa": _cpu_isa(),
        "cases": results,
    }


def measure(case: Case, *, budget_s: float) -> dict[str, Any]:
    """Medians of the forward pass and of forward + backward for every contender."""
    x, w_gate_up, w_down, topk_weights, topk_ids = make_inputs(case)
    result: dict[str, Any] = {"name": case.name, "shape": case.shape, "max_difference": {}}
    arguments = (x, w_gate_up, w_down, topk_weights, topk_ids)
    with torch.no_grad():
        truth = moe_ffn(*arguments).double()
        for name, block in CONTENDERS.items():
            difference = (block(*arguments).double() - truth).norm() / truth.norm()
            result["max_difference"][name] = float(difference)

    grad_y = torch.randn_like(x)
    leaves = [t.clone().requires_grad_() for t in arguments[:4]]
    trained = (*leaves, topk_ids)

    def forward(block: Block) -> None:
        with torch.no_grad():
            block(*arguments)

    def both(block: Block) -> None:
        y = block(*trained)
        torch.autograd.grad(y, leaves, grad_y)

    passes: dict[str, Callable[[Block], None]] = {"forward": forward, "forward_backward": both}
    for key, job in passes.items():
        jobs = {name: functools.partial(job, block) for name, block in CONTENDERS.items()}
        result[key] = alternate(jobs, budget_s=budget_s)
    return result


def alternate(jobs: Mapping[str, Callable[[], None]], *, budget_s: float) -> dict[str, Any]:
    """Run the jobs in turns until the budget is spent.

    Returns seconds (median) of each job, `speedup` of the last job over each other (median of the
    rounds' ratios) and the number of rounds.
    """
    *_, ours = jobs
    repeats = {}
    for name, job in jobs.items():
        job()
        started = time.perf_counter()
        job()
        # A round of a fast job repeats it, so that the clock and the scheduler do not decide.
        repeats[name] = max(1, min(50, round(0.01 / max(1e-6, time.perf_counter() - started))))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    end = time.perf_counter() + budget_s
    names = list(jobs)
    for round_number in range(_MAX_ROUNDS):
        if round_number >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            job = jobs[name]
            started = time.perf_counter()
            for _ in range(repeats[name]):
                job()
            times[name].append((time.perf_counter() - started) / repeats[name])
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "speedup": {
            name: statistics.median(a / b for a, b in zip(times[name], times[ours], strict=True))
            for name in names
            if name != ours
        },
        "rounds": len(times[ours]),
    }


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random x, weights and a routing by random logits: mildly uneven, as a trained router's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(case.dtype)

    x = normal(case.T, case.H)
    w_gate_up = normal(case.E, 2 * case.I, case.H, std=case.H**-0.5)
    w_down = normal(case.E, case.H, case.I, std=case.I**-0.5)
    logits = torch.randn(case.T, case.E, generator=generator)
    topk_weights, topk_ids = topk_router(logits, case.K, renormalize=True)
    return x, w_gate_up, w_down, topk_weights, topk_ids


def _cpu_isa() -> str:
    from moe_ops import _C

    return _C.cpu_isa()

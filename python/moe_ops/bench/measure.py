"""Measures a plan: the experts of layers, forward and in training.

Every baseline is checked against fp64 at every number of tokens before it is timed; one that is
wrong, fails or would take too long is reported as skipped with the reason. The benchmark of the
source tree adds modes and baselines; its results have the form defined here.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moe_ops
from moe_ops import _library
from moe_ops.bench import machine
from moe_ops.bench.baselines import (
    OURS,
    STEPS,
    Baseline,
    Bind,
    Step,
    builtin_baselines,
    exact_grad_x,
    skipped_steps,
    tolerance,
)
from moe_ops.bench.limits import Limits, measure_limits
from moe_ops.bench.shapes import (
    DTYPES,
    SHAPES,
    Bank,
    Tokens,
    exact_output,
    flops,
    make_bank,
    make_tokens,
    take,
)
from moe_ops.bench.timing import measure, speedup

FORMAT = 1
# A slower baseline is called twice, once to be checked and once to be timed, and is omitted at
# larger numbers of tokens.
SLOW_S = 6.0


@dataclass(frozen=True)
class Plan:
    """Benchmark plan: shapes by name, weight formats, numbers of tokens."""

    modes: tuple[str, ...] = ("forward", "training")
    shapes: tuple[str, ...] = ("a32", "d")
    formats: tuple[str, ...] = ("fp32", "bf16")
    tokens: tuple[int, ...] = (1, 4, 16, 64, 512)
    training_shapes: tuple[str, ...] = ("a32", "c", "d")
    training_tokens: tuple[int, ...] = (16, 64, 512)
    threads: int = 1
    budget_s: float = 5.0
    limit_s: float = 0.5


# Takes about a minute: a small and a medium layer. The defaults take about ten.
QUICK = Plan(
    modes=("forward", "training"),
    shapes=("d", "e"),
    tokens=(1, 16, 256),
    training_shapes=("e",),
    training_tokens=(16, 256),
    budget_s=0.8,
    limit_s=0.3,
)


@dataclass
class Session:
    """Benchmark run: its plan, its baselines, and a function for progress messages."""

    plan: Plan
    baselines: list[Baseline]
    log: Callable[[str], None]


Cells = list[dict[str, Any]]
Steps = Mapping[str, Callable[[Bank, Tokens, Tensor], Step]]


def run(
    plan: Plan,
    *,
    baselines: Sequence[Baseline] | None = None,
    modes: Mapping[str, Callable[[Session], Cells]] | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures everything in the plan; returns the data that ``--json`` writes. Times are in ms.

    Args:
        plan: what to measure; the functions of `modes` may need a subclass.
        baselines: the baselines; the built-in ones if None.
        modes: name of a mode -> function that measures its cells; `MODES` if None.
        log: called with progress messages.
    """
    torch.set_num_threads(plan.threads)
    everyone = builtin_baselines() if baselines is None else baselines
    started = time.perf_counter()
    reasons = {c.name: why for c in everyone if (why := c.missing()) is not None}
    present = [c for c in everyone if c.name not in reasons]
    log(f"limits of {plan.threads} thread(s), {_library.cpu_isa()}")
    limits = measure_limits(plan.threads, seconds=plan.limit_s)
    session = Session(plan, present, log)
    result: dict[str, Any] = {
        "format": FORMAT,
        "machine": {"cpu": machine.cpu_name(), "detected_isa": _library.detected_isa()},
        "versions": versions(present),
        "isa": _library.cpu_isa(),
        "threads": plan.threads,
        "absent": reasons,
    }
    for mode in plan.modes:
        result[mode] = (modes or MODES)[mode](session)
        gc.collect()
    # Measured again at the end: on a shared machine the better of the two is nearer to the true
    # rate.
    limits = limits.best(measure_limits(plan.threads, seconds=plan.limit_s))
    result["limits"] = limits.to_dict()
    result["seconds"] = round(time.perf_counter() - started)
    add_floors(result, limits)
    return result


def add_floors(result: dict[str, Any], limits: Limits) -> None:
    """Adds the minimum time of each cell under the limits, and every baseline's fraction of it."""
    for mode in ("forward", "quantized", "training"):
        for cell in result.get(mode, ()):
            # Training counts three passes over weights, one of which writes gradients.
            working_set = cell["bytes"] * (2 / 3 if mode == "training" else 1)
            floor = limits.floor_s(cell["flops"], cell["bytes"], cell["weights"], working_set) * 1e3
            cell["floor_ms"] = floor
            for found in cell["contenders"].values():
                found["of_limit"] = floor / found["ms"]


# ---------------------------------------------------------------------------------- modes


def run_forward(session: Session) -> Cells:
    def cells_of(bank: Bank, weight_format: str) -> Cells:
        return forward_cells(session, bank, weight_format)

    return _of_layers(session.plan.shapes, session.plan.formats, cells_of)


def run_training(session: Session, steps: Steps = STEPS) -> Cells:
    def cells_of(bank: Bank, weight_format: str) -> Cells:
        return _training_cells(session, bank, weight_format, steps)

    return _of_layers(session.plan.training_shapes, session.plan.formats, cells_of)


def _of_layers(
    shapes: Sequence[str], formats: Sequence[str], cells_of: Callable[[Bank, str], Cells]
) -> Cells:
    cells = []
    for shape, weight_format in itertools.product(shapes, formats):
        # The weights of one layer are freed before those of the next are created.
        cells += cells_of(make_bank(SHAPES[shape], DTYPES[weight_format]), weight_format)
        gc.collect()
    return cells


MODES: Mapping[str, Callable[[Session], Cells]]
MODES = {"forward": run_forward, "training": run_training}


def forward_cells(
    session: Session, bank: Bank, weight_format: str, more: Sequence[Baseline] = ()
) -> Cells:
    """Measures the baselines of this format, and `more`, at each number of tokens."""
    plan, bound = session.plan, tolerance(weight_format)
    batch = make_tokens(bank.shape, bank.dtype, max(plan.tokens))
    rows = {T: torch.tensor(checked_rows(T)) for T in plan.tokens}
    needed = torch.cat(list(rows.values())).unique()
    exact = exact_output(bank, batch, needed)
    skipped: dict[str, str] = {}
    binds: dict[str, Bind] = {}
    for baseline in (*(b for b in session.baselines if weight_format in b.formats), *more):
        try:
            binds[baseline.name] = baseline.prepare(bank, weight_format)
        except Exception as problem:
            skipped[baseline.name] = in_a_sentence(problem)
    cells, slow = [], set[str]()
    for T in plan.tokens:
        tokens, truth = take(batch, T), exact[torch.searchsorted(needed, rows[T])]

        def error_of(y: Tensor, chosen: Tensor = rows[T], truth: Tensor = truth) -> float:
            return relative_error(y[chosen], truth)

        jobs = {name: functools.partial(bind, tokens) for name, bind in binds.items()}
        layer = ("forward", bank, weight_format, tokens)
        with torch.no_grad():
            cells.append(_cell(session, layer, jobs, error_of, bound, dict(skipped), slow))
    return cells


def _training_cells(session: Session, bank: Bank, weight_format: str, steps: Steps) -> Cells:
    plan, bound = session.plan, 2 * tolerance(weight_format)
    batch = make_tokens(bank.shape, bank.dtype, max(plan.training_tokens))
    cells, slow = [], set[str]()
    for T in plan.training_tokens:
        tokens = take(batch, T)
        grad_y = torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(2))
        grad_y = grad_y.to(bank.dtype)
        # dW has no cheap fp64 reference: all baselines must agree with the first, moe_ops.
        truth = {"x": exact_grad_x(bank, tokens, grad_y)}

        def error_of(gradients: dict[str, Tensor], truth: dict[str, Tensor] = truth) -> float:
            found = {"x": gradients["x"]}
            found |= {key: gradients[key][:, ::61].float() for key in ("w_gate_up", "w_down")}
            return max(relative_error(g, truth.setdefault(key, g)) for key, g in found.items())

        skipped, own = skipped_steps(), bank.in_huge_pages
        jobs = {
            name: functools.partial(
                make, own if name.startswith("moe_ops") else bank, tokens, grad_y
            )
            for name, make in steps.items()
            if name not in skipped
        }
        layer = ("training", bank, weight_format, tokens)
        cells.append(_cell(session, layer, jobs, error_of, bound, skipped, slow))
        del jobs, truth
        gc.collect()
    return cells


def _cell(
    session: Session,
    layer: tuple[str, Bank, str, Tokens],
    makes: Mapping[str, Callable[[], Callable[[], Any]]],
    error_of: Callable[[Any], float],
    bound: float,
    skipped: dict[str, str],
    slow: set[str],
) -> dict[str, Any]:
    """Checks and times the jobs of `makes`. `slow` collects those to skip at larger numbers of
    tokens."""
    mode, bank, weight_format, tokens = layer
    jobs: dict[str, Callable[[], Any]] = {}
    errors, first = dict[str, float](), dict[str, float]()
    for name, make in makes.items():
        if name in slow:
            skipped[name] = f"took more than {SLOW_S:g} s a call with fewer tokens"
            continue
        try:
            job = make()
            started = time.perf_counter()
            result = job()
            first[name] = time.perf_counter() - started
            errors[name] = error_of(result)
        except Exception as problem:
            skipped[name] = in_a_sentence(problem)
            continue
        if errors[name] <= bound:
            jobs[name] = job
        else:
            skipped[name] = f"wrong: relative error {errors[name]:.1e}"
    samples = measure(jobs, budget_s=session.plan.budget_s, slow_s=SLOW_S, first_s=first)
    slow |= {name for name, sample in samples.items() if sample.median > SLOW_S}
    ours = next((name for name in reversed(OURS) if name in samples), None)
    found: dict[str, Any] = {}
    for name, sample in samples.items():
        found[name] = sample.to_dict()
        if ours is not None and name != ours:
            found[name]["ours_faster"] = speedup(samples, ours, name)
        found[name]["error"] = errors[name]
    times = ", ".join(f"{name} {c['ms']:.3g}" for name, c in found.items())
    session.log(f"{mode} {bank.shape.name} {weight_format} T={tokens.count}: {times} ms")
    for name, why in skipped.items():
        session.log(f"  {name}: {why}")
    return {
        "mode": mode,
        "shape": bank.shape.name,
        "weights": weight_format,
        "T": tokens.count,
        "threads": session.plan.threads,
        "experts_used": tokens.experts_used,
        "flops": flops(bank.shape, tokens.count, training=mode == "training"),
        # A step reads the weights twice and writes gradients of equal size once.
        "bytes": tokens.weight_bytes(bank.shape, weight_format) * (3 if mode == "training" else 1),
        "ours": ours,
        # Recorded results use this key for all baselines, moe_ops included.
        "contenders": found,
        "skipped": skipped,
    }


# --------------------------------------------------------------------------------- helpers


def versions(baselines: Sequence[Baseline]) -> dict[str, str]:
    """Returns the versions of torch, of this package and of the baselines' packages."""
    packages = {b.package for b in baselines} - {"torch", "torch-moe-ops"}
    found = {"torch": torch.__version__, "torch-moe-ops": moe_ops.__version__}
    return found | {package: importlib.metadata.version(package) for package in sorted(packages)}


def checked_rows(num_tokens: int) -> list[int]:
    """Returns the first 16 rows and 16 more across the whole batch."""
    stride = max(1, num_tokens // 16)
    return sorted({*range(min(16, num_tokens)), *range(0, num_tokens, stride), num_tokens - 1})


def relative_error(y: Tensor, truth: Tensor) -> float:
    y, truth = y.detach(), truth.detach()
    return float((y.double() - truth.double()).norm() / truth.double().norm())


def in_a_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__

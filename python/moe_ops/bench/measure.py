"""Measures a plan: the experts of layers forward, with integer weights, and in training.

Every baseline is checked against fp64 at every number of tokens before it is timed; one that is
wrong, fails or would take too long is reported as skipped with the reason. The benchmark of the
source tree adds modes and baselines of its own; a result has the same form there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ops import _C
from moe_ops.bench import machine, training
from moe_ops.bench.baselines import OURS, Baseline, MoeOpsPacked, builtin_baselines, tolerance
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
from moe_ops.bench.timing import Samples, measure, speedup

FORMAT = 1
# A baseline that would need longer for a call is left out.
TOO_SLOW_S = 60.0
# How long it would need is foretold from the number of tokens before, if that took so long.
STEADY_S = 1.0
# One that needs longer than this is called twice: to be checked, and to be timed.
SLOW_S = 6.0


@dataclass(frozen=True)
class Plan:
    """What to measure. Shapes by name, formats of the weights, numbers of tokens."""

    modes: tuple[str, ...] = ("forward", "quantized", "training")
    shapes: tuple[str, ...] = ("a32", "d")
    formats: tuple[str, ...] = ("fp32", "bf16")
    tokens: tuple[int, ...] = (1, 4, 16, 64, 512)
    quantized_shapes: tuple[str, ...] = ("a32", "d")
    training_shapes: tuple[str, ...] = ("a32", "c", "d")
    training_tokens: tuple[int, ...] = (16, 64, 512)
    threads: int = 1
    budget_s: float = 5.0
    limit_s: float = 0.5
    only: tuple[str, ...] = ()


@dataclass
class Session:
    """One run: its plan, its baselines, and where progress is told."""

    plan: Any
    baselines: list[Baseline]
    log: Callable[[str], None]


Cells = list[dict[str, Any]]


def run(
    plan: Any,
    *,
    baselines: Sequence[Baseline] = (),
    modes: Mapping[str, Callable[[Session], Cells]] | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures everything in the plan; the result is what ``--json`` writes. Times are in ms.

    Args:
        plan: a `Plan`, or what the functions of `modes` take for one.
        baselines: other libraries beside the built-in ones.
        modes: name of a mode -> what measures its cells; `MODES` if None.
        log: called with a line of progress now and then.
    """
    torch.set_num_threads(plan.threads)
    everyone = [*builtin_baselines(), *baselines]
    if plan.only:
        everyone = [c for c in everyone if c.name in plan.only or c.name.startswith("moe_ops")]
    started, load_before = time.perf_counter(), machine.load()
    reasons = {c.name: why for c in everyone if (why := _absence(c)) is not None}
    present = [c for c in everyone if c.name not in reasons]
    log(f"limits of {plan.threads} thread(s), {_C.cpu_isa()}")
    limits = measure_limits(plan.threads, seconds=plan.limit_s)
    session = Session(plan, present, log)
    result: dict[str, Any] = {
        "format": FORMAT,
        "date": machine.now(),
        "machine": machine.describe_machine(),
        "versions": machine.describe_software(present),
        "isa": _C.cpu_isa(),
        "threads": plan.threads,
        "load": {"before": load_before},
        "absent": reasons,
    }
    for mode in plan.modes:
        result[mode] = (modes or MODES)[mode](session)
        gc.collect()
    # Again at the end: on a machine with company the better of the two is nearer to the truth.
    limits = limits.best(measure_limits(plan.threads, seconds=plan.limit_s))
    result["limits"] = limits.to_dict()
    result["load"]["after"] = machine.load()
    result["seconds"] = round(time.perf_counter() - started)
    add_floors(result, limits)
    return dict(rounded(result))


def add_floors(result: dict[str, Any], limits: Limits) -> None:
    """The time that the limits allow each cell, and every baseline's share of it."""
    for mode in ("forward", "quantized", "training"):
        for cell in result.get(mode, ()):
            # Of the three passes over weights that training counts, one writes gradients.
            working_set = cell["bytes"] * (2 / 3 if mode == "training" else 1)
            floor = limits.floor_s(cell["flops"], cell["bytes"], cell["weights"], working_set) * 1e3
            cell["floor_ms"] = floor
            for found in cell["contenders"].values():
                found["of_limit"] = floor / found["ms"]


def rounded(value: Any) -> Any:
    """Floats to four significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def _absence(baseline: Baseline) -> str | None:
    why = baseline.missing()
    if why is None and not baseline.follows_isa and _C.cpu_isa() != _C.detected_isa():
        return f"cannot be held to {_C.cpu_isa()}"
    return why


# ---------------------------------------------------------------------------------- modes


def run_forward(session: Session) -> Cells:
    cells = []
    for shape in session.plan.shapes:
        for weight_format in session.plan.formats:
            bank = make_bank(SHAPES[shape], DTYPES[weight_format])
            cells += _forward_cells(session, bank, weight_format)
            del bank
            gc.collect()
    return cells


def run_quantized(session: Session) -> Cells:
    """int8 and int4 baselines on weights that were bf16, beside our own bf16 (`bf16 moe_ops`)."""
    cells = []
    for shape in session.plan.quantized_shapes:
        bank = make_bank(SHAPES[shape], torch.bfloat16)
        for weight_format in ("int8", "int4"):
            cells += _forward_cells(session, bank, weight_format, [_Bfloat16()])
        del bank
        gc.collect()
    return cells


def run_training(session: Session) -> Cells:
    cells = []
    for shape in session.plan.training_shapes:
        for weight_format in session.plan.formats:
            bank = make_bank(SHAPES[shape], DTYPES[weight_format])
            cells += _training_cells(session, bank, weight_format)
            del bank
            gc.collect()
    return cells


MODES: Mapping[str, Callable[[Session], Cells]] = {
    "forward": run_forward,
    "quantized": run_quantized,
    "training": run_training,
}


class _Bfloat16(MoeOpsPacked):
    """Our bf16 among quantised baselines."""

    name = "bf16 moe_ops"
    formats = ()


def _forward_cells(
    session: Session, bank: Bank, weight_format: str, more: Sequence[Baseline] = ()
) -> Cells:
    plan, shape = session.plan, bank.shape
    batch = make_tokens(shape, bank.dtype, max(plan.tokens))
    rows = {T: checked_rows(T) for T in plan.tokens}
    needed = torch.tensor(sorted({row for each in rows.values() for row in each}))
    exact = exact_output(bank, batch, needed)
    skipped: dict[str, str] = {}
    bound: dict[str, Any] = {}
    chosen = [b for b in session.baselines if weight_format in b.formats]
    for baseline in (*chosen, *more):
        try:
            bound[baseline.name] = baseline.prepare(bank, weight_format)
        except Exception as problem:
            skipped[baseline.name] = in_a_sentence(problem)
    cells = []
    pace: dict[str, float] = {}
    for T in plan.tokens:
        tokens = take(batch, T)
        truth = exact[torch.searchsorted(needed, torch.tensor(rows[T]))]
        cell = _Cell("forward", bank, weight_format, tokens, pace, skipped)
        with torch.no_grad():
            for name, bind in bound.items():
                if cell.too_slow(name):
                    continue
                try:
                    job = bind(tokens)
                    y = cell.first_call(name, job)
                    error = relative_error(y[torch.tensor(rows[T])], truth)
                except Exception as problem:
                    cell.skipped[name] = in_a_sentence(problem)
                    continue
                cell.add(name, job, error, tolerance(weight_format))
            cells.append(cell.measured(session))
        pace = cell.pace
    return cells


def _training_cells(session: Session, bank: Bank, weight_format: str) -> Cells:
    plan, shape = session.plan, bank.shape
    batch = make_tokens(shape, bank.dtype, max(plan.training_tokens))
    cells, pace = [], dict[str, float]()
    for T in plan.training_tokens:
        tokens = take(batch, T)
        grad_y = torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(2))
        grad_y = grad_y.to(bank.dtype)
        cell = _Cell("training", bank, weight_format, tokens, pace, training.skipped())
        exact = training.exact_grad_x(bank, tokens, grad_y)
        weight_grads: dict[str, Tensor] = {}
        for name, step in training.steps(bank, tokens, grad_y).items():
            if cell.too_slow(name):
                continue
            gradients = cell.first_call(name, step)
            error = relative_error(gradients["x"], exact)
            # dW has no cheap truth in fp64: all baselines must agree with the first, ours.
            for key in ("w_gate_up", "w_down"):
                sampled = gradients[key][:, ::61].float()
                error = max(error, relative_error(sampled, weight_grads.setdefault(key, sampled)))
            cell.add(name, step, error, 2 * tolerance(weight_format))
        cells.append(cell.measured(session))
        pace = cell.pace
        del cell, weight_grads
        gc.collect()
    return cells


class _Cell:
    """One line of a report while it is being measured."""

    def __init__(
        self,
        mode: str,
        bank: Bank,
        weight_format: str,
        tokens: Tokens,
        pace: Mapping[str, float],
        skipped: Mapping[str, str],
    ) -> None:
        self.mode, self.bank, self.weight_format, self.tokens = mode, bank, weight_format, tokens
        self.pace, self.skipped = dict(pace), dict(skipped)
        self.jobs: dict[str, Callable[[], Any]] = {}
        self.errors: dict[str, float] = {}
        self.first: dict[str, float] = {}

    def too_slow(self, name: str) -> bool:
        """Whether the pace at fewer tokens says that a call would take too long."""
        seconds = self.pace.get(name, 0.0) * self.tokens.count
        if seconds <= TOO_SLOW_S:
            return False
        self.skipped[name] = f"would take about {seconds:.0f} s a call"
        return True

    def first_call(self, name: str, job: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = job()
        self.first[name] = time.perf_counter() - started
        return result

    def add(self, name: str, job: Callable[[], Any], error: float, bound: float) -> None:
        """Takes a baseline in, unless its result is wrong."""
        if error <= bound:
            self.jobs[name], self.errors[name] = job, error
        else:
            self.skipped[name] = f"wrong: relative error {error:.1e}"

    def measured(self, session: Session) -> dict[str, Any]:
        """Times the baselines; the cell of the result."""
        first = {name: self.first[name] for name in self.jobs}
        samples = measure(self.jobs, budget_s=session.plan.budget_s, slow_s=SLOW_S, first_s=first)
        T, medians = self.tokens.count, {name: s.median for name, s in samples.items()}
        self.pace = {name: s / T for name, s in medians.items() if s > STEADY_S}
        cell = self._to_dict(samples, session.plan.threads)
        where = f"{self.mode} {self.bank.shape.name} {self.weight_format} T={T}"
        times = ", ".join(f"{name} {c['ms']:.3g}" for name, c in cell["contenders"].items())
        session.log(f"{where}: {times} ms")
        for name, why in self.skipped.items():
            session.log(f"  {name}: {why}")
        return cell

    def _to_dict(self, samples: Mapping[str, Samples], threads: int) -> dict[str, Any]:
        ours = next((name for name in reversed(OURS) if name in samples), None)
        found: dict[str, Any] = {}
        for name, sample in samples.items():
            found[name] = sample.to_dict()
            if ours is not None and name != ours:
                found[name]["ours_faster"] = speedup(samples, ours, name)
            found[name]["error"] = self.errors[name]
        is_training = self.mode == "training"
        # A step reads the weights twice and writes gradients of their size once.
        passes = 3 if is_training else 1
        return {
            "mode": self.mode,
            "shape": self.bank.shape.name,
            "weights": self.weight_format,
            "T": self.tokens.count,
            "threads": threads,
            "experts_used": self.tokens.experts_used,
            "flops": flops(self.bank.shape, self.tokens.count, training=is_training),
            "bytes": self.tokens.weight_bytes(self.bank.shape, self.weight_format) * passes,
            "ours": ours,
            # Recorded results call the baselines so, ours among them.
            "contenders": found,
            "skipped": self.skipped,
        }


# --------------------------------------------------------------------------------- helpers


def checked_rows(num_tokens: int) -> list[int]:
    """The first 16 rows and some 16 more over the whole batch."""
    stride = max(1, num_tokens // 16)
    return sorted({*range(min(16, num_tokens)), *range(0, num_tokens, stride), num_tokens - 1})


def relative_error(y: Tensor, truth: Tensor) -> float:
    y, truth = y.detach(), truth.detach()
    return float((y.double() - truth.double()).norm() / truth.double().norm())


def in_a_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__

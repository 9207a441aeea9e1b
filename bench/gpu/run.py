"""Measures cases until the time is up: checks every baseline, then times them, interleaved."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import moe_ops
from bench.gpu import card, cases, planner
from bench.gpu.attention import attention_problem, linear_problem
from bench.gpu.block import OURS, block_problem
from bench.gpu.cases import Case
from bench.gpu.clock import Clock, CudaClock, HostClock, Prepared
from bench.gpu.formats import format_problem
from bench.gpu.fp8 import fp8_problem
from bench.gpu.gradients import gradient_problem
from bench.gpu.layer import Layer, Weights
from bench.gpu.limits import Limits, measure_limits
from bench.gpu.ops import op_problem
from bench.gpu.peers import PEERS
from bench.gpu.problem import Problem
from bench.gpu.work import work_of
from bench.harness.files import commit, rounded
from bench.harness.machine import now
from moe_ops import _library, doctor
from moe_ops.bench.measure import in_a_sentence
from moe_ops.bench.shapes import Shape
from moe_ops.bench.timing import Samples, speedup

KIND, FORMAT = "gpu", 1
# The op that each part requires.
_OP_OF = {
    "forward": "moe_ffn",
    "training": "moe_ffn",
    "grouped_gemm_down": "grouped_gemm",
    "forward_fp8": "moe_ffn_fp8",
    **dict.fromkeys(cases.QUANTIZED, "moe_ffn_quantized"),
    **dict.fromkeys(cases.STORED, "moe_ffn"),
    **dict.fromkeys(cases.ATTENTION, "moa_attention"),
}
# Maximum fraction of the time for a baseline's first calls (compiling, tuning), all cases together.
_FIRST_CALLS_SHARE = 0.08
# Baselines of a case, for estimates: ours, unfused, torch and its loop; an op has one or two fewer.
_BASELINES = {"forward": 5, "training": 4}
# A baseline this many times slower than ours is not repeated if its rounds do not fit.
_SLOW = 10.0


@dataclass(frozen=True)
class Options:
    """Cases to measure and their time. Without `tokens`, the values in `cases` for each part.
    `tiny` is for a run without a GPU."""

    seconds: float
    parts: tuple[str, ...] = cases.PARTS
    shapes: tuple[Shape, ...] = tuple(cases.MODELS.values())
    tokens: tuple[int, ...] | None = None
    routings: tuple[str, ...] = cases.USUAL_ROUTINGS
    dtypes: tuple[str, ...] = cases.USUAL_DTYPES
    tiny: bool = False
    # Cases that an earlier run has measured, by their text.
    done: frozenset[str] = frozenset()


@dataclass
class Session:
    options: Options
    clock: Clock
    limits: Limits
    log: Callable[[str], None]
    # Baselines missing in every case, with reasons.
    absent: dict[str, str] = field(default_factory=dict)
    first_calls_s: dict[str, float] = field(default_factory=dict)

    def compiled(self, function: Any) -> Any:
        """Returns the function compiled once for all sizes."""
        backend = "eager" if self.options.tiny else "inductor"
        return torch.compile(function, dynamic=True, backend=backend)

    def worn_out(self, name: str) -> bool:
        spent = self.first_calls_s.get(name, 0.0)
        return name != OURS and spent > _FIRST_CALLS_SHARE * self.options.seconds


def measure(
    options: Options,
    *,
    device: str = "cuda",
    log: Callable[[str], None] = lambda _: None,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
    on_cell: Callable[[Case, dict[str, Any]], None] = lambda case, cell: None,
) -> dict[str, Any]:
    """Returns the result for JSON. `save` gets it after every layer, incomplete.

    Args:
        options: what to measure.
        device: cuda, or cpu for a run with the CPU kernels and the host's clock.
        log: called with progress messages.
        save: called with the incomplete result.
        on_cell: called with each case and its cell, as soon as it is measured.
    """
    started = time.perf_counter()
    clock: Clock = CudaClock() if device == "cuda" else HostClock()
    if device == "cpu":
        torch.set_num_threads(1)  # Tiny layers: a second thread only waits for the first.
    fp8 = device == "cuda" and any(part in cases.FP8 for part in options.parts)
    limits = measure_limits(clock, tiny=options.tiny, fp8=fp8)
    log(_describe(limits))
    session = Session(options, clock, limits, log)
    session.absent |= {
        part: f"this build has no {device.upper()} kernel of it"
        for part in options.parts
        if not doctor.has_kernel(op_of(part), device)
    }
    parts = [part for part in options.parts if part not in session.absent]
    wanted = cases.all_cases(
        parts, options.shapes, options.tokens, options.routings, options.dtypes
    )
    wanted = [case for case in wanted if str(case) not in options.done]
    pacer = planner.Pacer(
        wanted,
        costs_of(wanted, limits, clock.flush_s),
        time.perf_counter,
        started + options.seconds,
    )
    result: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "complete": False,
        "dry_run": options.tiny,
        "date": now(),
        "card": card.describe_card(clock.device),
        "versions": versions(),
        "limits": limits.to_dict(),
        "absent": session.absent,
        "cells": [],
        "left_out": [],
    }
    watch = card.Watch(clock.device)
    try:
        _measure_all(session, pacer, result, save, on_cell)
    finally:
        result["clocks"] = watch.stop()
    if "aborted" not in result:
        # Measured again at the end: the better of the two is nearer to the true rate.
        limits = limits.best(measure_limits(clock, tiny=options.tiny, fp8=fp8))
    result["limits"] = limits.to_dict()
    result["left_out"] = [str(case) for case in pacer.left_out]
    result["seconds"] = round(time.perf_counter() - started)
    result["complete"] = "aborted" not in result
    add_floors(result, limits)
    return dict(rounded(result))


def op_of(part: str) -> str:
    """Returns the op that a part measures."""
    return _OP_OF.get(part, part.removesuffix("_training"))


def costs_of(wanted: Sequence[Case], limits: Limits, flush_s: float) -> list[planner.Cost]:
    """Returns cost estimates, with all experts in use."""
    found = []
    for case in wanted:
        rates = planner.Rates(limits.flops(case.dtype), limits.copy_bytes, flush_s)
        work = work_of(case, min(case.shape.E, case.num_slots))
        bank = 2.0 * 3 * case.shape.E * case.shape.H * case.shape.I
        found.append(planner.cost_of(work, _BASELINES.get(case.part, 3), bank, rates))
    return found


def add_floors(result: dict[str, Any], limits: Limits) -> None:
    """Adds the minimum time of each case under the limits, and every baseline's fraction of it."""
    for cell in result["cells"]:
        seconds = max(
            cell["flops"] / limits.flops(cell["dtype"]), cell["bytes"] / limits.copy_bytes
        )
        cell["floor_us"] = seconds * 1e6
        for baseline in cell["contenders"].values():
            baseline["of_limit"] = cell["floor_us"] / baseline["us"]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if at := commit():
        found["commit"] = at
    found["moe_ops"] = moe_ops.__version__
    found["kernels"] = dict(_library.build_info())["cuda"]
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for peer in PEERS:
        if version := peer.version():
            found[peer.package] = version
    return found


def _measure_all(
    session: Session,
    pacer: planner.Pacer,
    result: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
    on_cell: Callable[[Case, dict[str, Any]], None],
) -> None:
    weights: Weights | None = None
    layer: Layer | None = None
    group: tuple[str, str] | None = None
    for case, rounds in pacer:
        if weights is None or group != case.group:
            weights = layer = None
            session.clock.release()
            if result["cells"]:
                add_floors(result, session.limits)
                save(dict(rounded({**result, "left_out": [str(c) for c in pacer.left_out]})))
            group = case.group
            weights = Weights(case.shape, session.clock.device, case.dtype)
        if layer is None or (layer.case.T, layer.case.routing) != (case.T, case.routing):
            layer = Layer(case, weights, session.clock.device)
        cost = costs_of([case], session.limits, session.clock.flush_s)[0]
        try:
            cell = measure_case(session, case, layer, rounds * cost.round_s, cost.least_rounds)
        except Exception as problem:  # Inputs that do not fit, or no reference.
            used = min(case.shape.E, case.num_slots)
            cell = _cell(case, used, {}, {}, {}, {OURS: in_a_sentence(problem)})
            session.log(f"{case}: {cell['skipped'][OURS]}")
            layer = None
        result["cells"].append(cell)
        on_cell(case, cell)
        session.clock.release()
        broken = _broken(session.clock.device)
        if broken:
            result["aborted"] = f"{case}: {broken}"
            session.log(result["aborted"])
            return


def measure_case(
    session: Session,
    case: Case,
    layer: Layer,
    granted_s: float,
    least_rounds: int = planner.MIN_ROUNDS,
) -> dict[str, Any]:
    """Measures one cell: checks every baseline, then runs rounds for about `granted_s` seconds."""
    problem = problem_of(session, case, layer)
    session.absent |= problem.absent
    prepared, errors, skipped = _prepare(session, problem)
    slow = _slow_ones(prepared, granted_s, least_rounds)
    repeated = {name: p for name, p in prepared.items() if name not in slow}
    samples = {name: Samples({0: prepared[name].once_s}) for name in slow}
    round_s = sum(p.once_s + session.clock.flush_s for p in repeated.values())
    count = int(granted_s / round_s) if round_s > 0 else 0
    count = min(planner.MAX_ROUNDS, max(least_rounds, count))
    samples = {**session.clock.rounds(repeated, count), **samples}
    used = layer.tokens.experts_used
    cell = _cell(case, used, samples, prepared, errors, skipped)
    times = ", ".join(f"{n} {c['us']:.4g}" for n, c in cell["contenders"].items())
    session.log(f"{case}: {times} us" if times else f"{case}: nothing ran")
    for name, why in skipped.items():
        session.log(f"  {name}: {why}")
    return cell


def problem_of(session: Session, case: Case, layer: Layer) -> Problem:
    if case.part in cases.BLOCK:
        return block_problem(case, layer, session.compiled)
    for parts, make in (
        ((*cases.QUANTIZED, *cases.STORED), format_problem),
        (cases.MOVES_TRAINING, gradient_problem),
        (cases.LINEAR, linear_problem),
        (cases.ATTENTION, attention_problem),
    ):
        if case.part in parts:
            return make(case, layer)
    return (fp8_problem if case.part in cases.FP8 else op_problem)(case, layer)


def _prepare(
    session: Session, problem: Problem
) -> tuple[dict[str, Prepared], dict[str, float], dict[str, str]]:
    prepared: dict[str, Prepared] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, job in problem.jobs.items():
        if session.worn_out(name):
            skipped[name] = "its first calls have used up its share of the time"
            continue
        started = time.perf_counter()
        try:
            error = problem.check(job())
            if error <= problem.tolerance:
                prepared[name] = session.clock.prepare(job)
                errors[name] = error
            else:
                skipped[name] = f"wrong: relative error {error:.1e}"
        except Exception as trouble:
            skipped[name] = in_a_sentence(trouble)
            if session.clock.device.type == "cuda":
                session.clock.release()
            if _broken(session.clock.device):
                break
        spent = session.first_calls_s.get(name, 0.0) + time.perf_counter() - started
        session.first_calls_s[name] = spent
    return prepared, errors, skipped


def _slow_ones(prepared: dict[str, Prepared], granted_s: float, least_rounds: int) -> list[str]:
    """Returns baselines far slower than the first, whose rounds would exceed the case's time."""
    if not prepared:
        return []
    first = next(iter(prepared.values())).once_s
    return [
        name
        for name, p in prepared.items()
        if p.once_s * least_rounds > granted_s and p.once_s > _SLOW * first
    ]


def _cell(
    case: Case,
    used: int,
    samples: dict[str, Samples],
    prepared: dict[str, Prepared],
    errors: dict[str, float],
    skipped: dict[str, str],
) -> dict[str, Any]:
    work = work_of(case, used)
    baselines: dict[str, Any] = {}
    # In the order of the problem; slow ones were timed separately.
    for name in prepared:
        sample = samples[name]
        found: dict[str, Any] = {"us": sample.median * 1e6, "rounds": len(sample.used)}
        found["error"] = errors[name]
        if (peak := prepared[name].peak_bytes) is not None:
            found["peak_mib"] = peak / 2**20
        if prepared[name].note:  # No graph.
            found["eager"] = prepared[name].note
        if name != OURS and OURS in samples:
            found["ours_faster"] = speedup(samples, OURS, name)
        baselines[name] = found
    return {
        "part": case.part,
        "shape": case.shape.name,
        "T": case.T,
        "routing": case.routing,
        "dtype": case.dtype,
        "used": used,
        "flops": work.flops,
        "bytes": work.bytes,
        "contenders": baselines,
        "skipped": skipped,
    }


def _broken(device: torch.device) -> str:
    """Returns the device's error after a fault, from which a process cannot recover; empty if there
    is none."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except Exception as problem:
        return in_a_sentence(problem)
    return ""


def _describe(limits: Limits) -> str:
    return (
        f"limits: bf16 {limits.bf16_flops / 1e12:.1f} TFLOP/s, copy "
        f"{limits.copy_bytes / 1e9:.0f} GB/s, launch {limits.launch_s * 1e6:.1f} us"
    )

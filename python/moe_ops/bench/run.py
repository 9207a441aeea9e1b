"""Runs a plan, and what needs no file of its own: threads, parts, memory, the second process."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from moe_ops import _C
from moe_ops.bench import machine, parts, training
from moe_ops.bench.contenders import Contender, MoeOpsPacked, builtin_contenders
from moe_ops.bench.forward import run_forward, run_quantized
from moe_ops.bench.limits import Limits, measure_limits
from moe_ops.bench.memory import measure_memory
from moe_ops.bench.session import MODES, Plan, Session
from moe_ops.bench.shapes import DTYPES, SHAPES, make_bank, make_tokens
from moe_ops.bench.timing import alternate, speedup

FORMAT = 1
THP = {"THP_MEM_ALLOC_ENABLE": "1"}


def run(
    plan: Plan,
    *,
    contenders: Sequence[Contender] = (),
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures everything in the plan; the result is what ``--json`` writes. Times are in ms.

    Args:
        plan: what to measure.
        contenders: peers beside the built-in ones.
        log: called with a line of progress now and then.
    """
    torch.set_num_threads(plan.threads)
    everyone = [*builtin_contenders(), *contenders]
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
    runners: dict[str, Callable[[Session], list[dict[str, Any]]]] = {
        "forward": run_forward,
        "quantized": run_quantized,
        "training": run_training_twice,
        "scaling": run_scaling,
        "parts": run_parts,
        "memory": run_memory,
    }
    for mode in plan.modes:
        result[mode] = runners[mode](session)
        gc.collect()
    # Again at the end: on a machine with company the better of the two is nearer to the truth.
    limits = limits.best(measure_limits(plan.threads, seconds=plan.limit_s))
    result["limits"] = limits.to_dict()
    result["load"]["after"] = machine.load()
    result["seconds"] = round(time.perf_counter() - started)
    _add_floors(result, limits)
    return rounded(result)


def run_training_twice(session: Session) -> list[dict[str, Any]]:
    """The second time, of the first shape, in a process whose large tensors get huge pages."""
    plan = session.plan
    cells = training.run_training(session)
    if plan.thp and sys.platform == "linux":
        child = replace(
            plan, modes=("training",), thp=False, training_shapes=plan.training_shapes[:1]
        )
        session.log("again with THP_MEM_ALLOC_ENABLE=1, in a process of its own")
        cells += run_child(child, THP)["training"]
    return cells


def run_scaling(session: Session) -> list[dict[str, Any]]:
    """Our own forward and training step with one and with two threads, in turns."""
    plan, cells = session.plan, []
    counts = (1, 2)
    if (os.cpu_count() or 1) < max(counts):
        session.log("scaling: skipped, one core")
        return []
    for weight_format in plan.formats:
        bank = make_bank(SHAPES[plan.shapes[0]], DTYPES[weight_format])
        for T in [t for t in plan.tokens if t in (1, 16, 512)]:
            tokens = make_tokens(bank.shape, bank.dtype, T)
            grad_y = torch.randn(tokens.x.shape).to(bank.dtype)
            forward = MoeOpsPacked().prepare(bank, weight_format)(tokens)
            step = training.steps(bank, tokens, grad_y)[training.OURS]
            for mode, job in (("forward", forward), ("training", step)):
                jobs = {str(n): _with_threads(n, job, mode) for n in counts}
                samples = alternate(jobs, budget_s=plan.budget_s)
                cell: dict[str, Any] = {"mode": mode, "shape": bank.shape.name}
                cell |= {"weights": weight_format, "T": T}
                cell["ms"] = {n: sample.median * 1e3 for n, sample in samples.items()}
                cell["speedup"] = speedup(samples, "2", "1")
                cell["noisy"] = not all(sample.clean for sample in samples.values())
                cells.append(cell)
                session.log(f"2 threads: {mode} {weight_format} T={T} {cell['speedup']:.2f}x")
        del bank
        gc.collect()
    torch.set_num_threads(plan.threads)
    return cells


def _with_threads(count: int, job: Callable[[], object], mode: str) -> Callable[[], object]:
    def call() -> object:
        torch.set_num_threads(count)
        with torch.set_grad_enabled(mode == "training"):
            return job()

    return call


def run_parts(session: Session) -> list[dict[str, Any]]:
    results = []
    for part in parts.PARTS:
        for T in session.plan.part_tokens:
            budget_s = min(1.0, session.plan.budget_s)
            results.append(parts.measure_part(part, T, budget_s=budget_s))
            session.log(f"{part} T={T}: " + _ratios(results[-1]["speedup"]))
    return results


def run_memory(session: Session) -> list[dict[str, Any]]:
    results = []
    for shape in session.plan.memory_shapes:
        for weight_format in session.plan.formats:
            for T in session.plan.training_tokens[-2:]:
                results.append(measure_memory(shape, weight_format, T))
                mib = {k: f"{v:.0f}" for k, v in results[-1]["mib"].items()}
                session.log(f"memory {shape} {weight_format} T={T}: {mib} MiB")
    return results


def run_child(plan: Plan, environment: Mapping[str, str]) -> dict[str, Any]:
    """The plan in a process of its own with more environment; built-in contenders only."""
    code = (
        "import sys, json; from moe_ops.bench.run import Plan, run; plan = json.load(sys.stdin); "
        "plan = {k: tuple(v) if isinstance(v, list) else v for k, v in plan.items()}; "
        "json.dump(run(Plan(**plan)), sys.stdout)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(plan.__dict__),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(f"The child process failed:\n{child.stderr}")
    return dict(json.loads(child.stdout))


# --------------------------------------------------------------------------------- helpers


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of several runs of parts of a plan, all by the same code on the same machine.

    Shares of the limits are worked out again, from the largest limits that any of them measured.

    Raises:
        ValueError: runs that differ in machine, versions, instruction set or threads.
    """
    first = results[0]
    joined: dict[str, Any] = {**first, "load": dict(first["load"]), "seconds": 0}
    joined |= {mode: [] for mode in MODES if any(mode in result for result in results)}
    for result in results:
        for key in ("format", "machine", "isa", "threads"):
            if result[key] != first[key]:
                raise ValueError(
                    f"join: {key} must be the same in all runs, got {first[key]} and {result[key]}."
                )
        for name in result["versions"].keys() & joined["versions"].keys():
            if result["versions"][name] != first["versions"].get(name, result["versions"][name]):
                raise ValueError(f"join: all runs must have the same {name}.")
        joined["versions"] = {**joined["versions"], **result["versions"]}
        joined["seconds"] += result["seconds"]
        joined["load"]["after"] = result["load"]["after"]
        joined["date"] = min(joined["date"], result["date"])
        for mode in MODES:
            joined[mode] = [*joined.get(mode, ()), *copy.deepcopy(result.get(mode, []))]
    joined = {k: v for k, v in joined.items() if k not in MODES or v}
    limits = reduce(Limits.best, [Limits.from_dict(result["limits"]) for result in results])
    joined["limits"] = limits.to_dict()
    _add_floors(joined, limits)
    return dict(rounded(joined))


def rounded(value: Any) -> Any:
    """Floats to four significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def _absence(contender: Contender) -> str | None:
    why = contender.missing()
    if why is None and not contender.follows_isa and _C.cpu_isa() != _C.detected_isa():
        return f"cannot be held to {_C.cpu_isa()}"
    return why


def _add_floors(result: dict[str, Any], limits: Limits) -> None:
    for mode in ("forward", "quantized", "training"):
        for cell in result.get(mode, ()):
            # Of the three passes over weights that training counts, one writes gradients.
            working_set = cell["bytes"] * (2 / 3 if mode == "training" else 1)
            floor = limits.floor_s(cell["flops"], cell["bytes"], cell["weights"], working_set) * 1e3
            cell["floor_ms"] = floor
            for contender in cell["contenders"].values():
                contender["of_limit"] = floor / contender["ms"]


def _ratios(speedups: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.2f}x {name}" for name, value in speedups.items())

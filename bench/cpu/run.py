"""The plan of the whole CPU benchmark, and the modes that only it has."""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import torch

from bench.cpu import parts
from bench.cpu.kept import TIMED
from bench.cpu.memory import measure_memory
from bench.cpu.quantized import MoeOpsQuantized, run_quantized
from bench.harness.files import ROOT, commit, rounded
from bench.harness.machine import describe_machine, load, now
from moe_ops.bench import measure
from moe_ops.bench.baselines import STEPS, Baseline, MoeOpsPacked, builtin_baselines
from moe_ops.bench.limits import Limits
from moe_ops.bench.measure import Cells, Session, add_floors
from moe_ops.bench.shapes import DTYPES, SHAPES, make_bank, make_tokens
from moe_ops.bench.timing import measure as time_jobs
from moe_ops.bench.timing import speedup

MODES = ("forward", "quantized", "training", "scaling", "parts", "memory")
THP = {"THP_MEM_ALLOC_ENABLE": "1"}


@dataclass(frozen=True)
class Plan(measure.Plan):
    """Plan of everything. `thp`: also train in a process whose large tensors get huge pages."""

    modes: tuple[str, ...] = MODES
    shapes: tuple[str, ...] = ("a32", "b", "c", "d")
    quantized_shapes: tuple[str, ...] = ("a32", "d")
    part_tokens: tuple[int, ...] = (1, 64, 512, 2048)
    memory_shapes: tuple[str, ...] = ("a32",)
    thp: bool = True


def run(
    plan: Plan,
    *,
    baselines: Sequence[Baseline] = (),
    only: Sequence[str] | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs `moe_ops.bench.measure.run` with every mode."""
    modes = {
        **measure.MODES,
        "quantized": run_quantized,
        "training": run_training_twice,
        "scaling": run_scaling,
        "parts": run_parts,
        "memory": run_memory,
    }
    everyone = [*builtin_baselines(), MoeOpsQuantized(), *baselines]
    if only:
        everyone = [b for b in everyone if b.name in only or b.name.startswith("moe_ops")]
    before, date = load(), now()
    result = measure.run(plan, baselines=everyone, modes=modes, log=log)
    result |= {"date": date, "machine": describe_machine()}
    result["load"] = {"before": before, "after": load()}
    result["versions"]["python"] = platform.python_version()
    if at := commit():
        result["versions"]["commit"] = at
    return dict(rounded(result))


def run_training_twice(session: Session) -> Cells:
    """Measures training twice, the second time for the first shape in a process whose large tensors
    get huge pages."""
    plan = session.plan
    cells = measure.run_training(session, TIMED)
    for cell in cells:
        cell["thp"] = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    if plan.thp and sys.platform == "linux":
        child = replace(
            plan, modes=("training",), thp=False, training_shapes=plan.training_shapes[:1]
        )
        session.log("again with THP_MEM_ALLOC_ENABLE=1, in a process of its own")
        cells += run_child(child, THP)["training"]
    return cells


def run_scaling(session: Session) -> Cells:
    """Measures our own forward and training step with one and with two threads, interleaved."""
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
            step = STEPS["moe_ops"](bank.in_huge_pages, tokens, grad_y)
            for mode, job in (("forward", forward), ("training", step)):
                jobs = {str(n): _with_threads(n, job, mode) for n in counts}
                samples = time_jobs(jobs, budget_s=plan.budget_s)
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


def run_parts(session: Session) -> Cells:
    results = []
    for part in parts.PARTS:
        for T in session.plan.part_tokens:
            budget_s = min(1.0, session.plan.budget_s)
            results.append(parts.measure_part(part, T, budget_s=budget_s))
            session.log(f"{part} T={T}: " + _ratios(results[-1]["speedup"]))
    return results


def run_memory(session: Session) -> Cells:
    results = []
    for shape in session.plan.memory_shapes:
        for weight_format in session.plan.formats:
            for T in session.plan.training_tokens[-2:]:
                results.append(measure_memory(shape, weight_format, T))
                mib = {k: f"{v:.0f}" for k, v in results[-1]["mib"].items()}
                session.log(f"memory {shape} {weight_format} T={T}: {mib} MiB")
    return results


def run_child(plan: Plan, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs the plan in a child process with more environment variables; built-in baselines only."""
    code = (
        "import sys, json; from bench.cpu.run import Plan, run; plan = json.load(sys.stdin); "
        "plan = {k: tuple(v) if isinstance(v, list) else v for k, v in plan.items()}; "
        "json.dump(run(Plan(**plan)), sys.stdout)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(asdict(plan)),
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(f"The child process failed:\n{child.stderr}")
    return dict(json.loads(child.stdout))


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins results of several runs of parts of a plan, all with one code version on one machine.

    Fractions of the limits are recomputed from the largest limits that any of them measured.

    Raises:
        ValueError: runs differ in machine, versions, instruction set or threads.
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
    limits = reduce(Limits.best, [limits_of(result) for result in results])
    joined["limits"] = limits.to_dict()
    add_floors(joined, limits)
    return dict(rounded(joined))


def limits_of(result: Mapping[str, Any]) -> Limits:
    """Returns the limits of a result, also after JSON, whose keys are strings."""
    saved = result["limits"]
    cached = {int(size): rate for size, rate in saved.get("cached_bytes", {}).items()}
    return Limits(**{**saved, "cached_bytes": cached})


def _ratios(speedups: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.2f}x {name}" for name, value in speedups.items())

"""The command: ``python -m bench.gpu.lease``. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.gpu import steps
from bench.gpu.lease import build
from bench.gpu.lease.build import Sources
from bench.gpu.lease.journal import Journal
from bench.gpu.lease.plan import Lease, Step, child, steps_of_a_lease
from bench.gpu.steps import Outcome
from bench.harness.files import ROOT

# Reserved for the table and the result.
_RESERVE_S = 20.0
# Lines of each step's output kept in log.txt.
_KEPT_LINES = 150
_TRACE = ("failed", "unfinished")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.lease",
        description="Builds, tests and measures on a machine that is lent for minutes.",
    )
    names = [step.name for step in steps_of_a_lease()]
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "lease" / "out")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    parser.add_argument("--cutlass", type=Path, help="the nvidia-cutlass wheel, or its headers")
    parser.add_argument("--library", type=Path, help="a built libmoe_ops.so of this tree")
    parser.add_argument("--package", type=Path, help="a folder with a built moe_ops in it")
    parser.add_argument("--define", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--peers", type=Path, help="a folder with sources of other libraries")
    parser.add_argument("--steps", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--without", nargs="+", choices=names, metavar="STEP", default=[])
    parser.add_argument(
        "--again", nargs="+", choices=names, metavar="STEP", default=[], help="though it has passed"
    )
    parser.add_argument("--dry", action="store_true", help="tiny layers; needs no card")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every requested step has passed, 1 if not."""
    options = parse(arguments)
    started = time.time()
    sources = Sources(options.cutlass, options.library, options.package, tuple(options.define))
    lease = Lease(options.out.resolve(), sources, options.dry, options.peers)
    enter(lease)
    chosen = [
        step
        for step in steps_of_a_lease()
        if step.name in (options.steps or [step.name]) and step.name not in options.without
    ]
    reserve = 0.0 if options.dry else _RESERVE_S
    end = started + 60 * options.minutes - reserve

    def log(line: str) -> None:
        print(f"[{time.time() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

    good = walk(lease, chosen, end, options.again, log)
    if build.is_built(sources):
        child("result")(lease, max(reserve, 60.0), "result")
        print(steps.log_of("lease-result").read_text(errors="replace"))
    print(outcomes(lease.journal))
    return 0 if good else 1


def outcomes(journal: Journal) -> str:
    """Returns one line per step with its outcome."""
    lines = []
    for step in steps_of_a_lease():
        outcome = journal.outcome(step.name)
        if outcome is None:
            lines.append(f"{step.name:<16}–")
        else:
            seconds = f"{outcome['seconds']:.0f} s"
            lines.append(
                f"{step.name:<16}{outcome['status']:<11}{seconds:>6}  {outcome['text'][:160]}"
            )
    return "\n".join(lines)


def enter(lease: Lease) -> None:
    """Sets the environment in which children find the package, the tree and the peers."""
    parts = [str(build.package_of(lease.sources)), str(ROOT)]
    if lease.peers is not None:
        parts.append(str(lease.peers.resolve()))
    parts += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(part for part in parts if part))


def walk(
    lease: Lease,
    chosen: Sequence[Step],
    end: float,
    again: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
    now: Callable[[], float] = time.time,
) -> bool:
    """Runs the steps that have not passed yet; returns whether all have passed.

    A step gets its limit or the remaining time, whichever is less, and its outcome is recorded
    before the next one begins. A failure does not stop the run; without a build only the steps that
    need none run.
    """
    journal, built = lease.journal, build.is_built(lease.sources)
    good = True
    for step in chosen:
        if step.name not in again and journal.passed(step.name) and step.stays(lease):
            log(f"{step.name}: done before")
            continue
        if step.needs_build and not built:
            log(f"{step.name}: not begun, there is no build")
            good = False
            continue
        left = end - now()
        if left < step.least_s:
            log(f"{step.name}: not begun, {max(0.0, left):.0f} s are left")
            good = False
            continue
        limit_s = min(step.limit_s, left)
        log(f"{step.name}, for {limit_s:.0f} s at most")
        outcome = _run(step, lease, limit_s)
        journal.write("outcome", step.name, **outcome, tree=build.fingerprint(), at=round(now()))
        log(f"{step.name}: {outcome['status']}, {outcome['text']}")
        _keep_log(lease, step.name, outcome)
        good &= outcome["status"] in ("passed", "skipped")
        built = build.is_built(lease.sources)
    return good


def _run(step: Step, lease: Lease, limit_s: float) -> Outcome:
    begun = time.perf_counter()
    try:
        return step.run(lease, limit_s, step.name)
    except Exception as problem:
        seconds = round(time.perf_counter() - begun, 1)
        return {
            "status": "failed",
            "seconds": seconds,
            "text": f"{type(problem).__name__}: {problem}",
        }


def _keep_log(lease: Lease, name: str, outcome: Outcome) -> None:
    """Appends the end of a step's output to one file for all steps: a lent machine may return only
    few files."""
    for log in (steps.log_of(f"lease-{name}"), steps.log_of(name)):
        if outcome["status"] in _TRACE and log.exists():
            lines = log.read_text(errors="replace").splitlines()[-_KEPT_LINES:]
            with (lease.out / "log.txt").open("a") as file:
                file.write("\n".join([f"===== {name}", *lines, ""]))
            return

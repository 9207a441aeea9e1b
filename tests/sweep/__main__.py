"""python -m tests.sweep: runs cases, one or all, at one or all instruction sets.

    python -m tests.sweep --isa avx2 "op=grouped_gemm dtype=bf16 rows=129 k=193 n=8"
    python -m tests.sweep --minutes 10 --seed 1          # make fuzz
    python -m tests.sweep --short --isa avx512           # what tests/sweep/test_boundaries.py runs

Without a case, every instruction set of the machine takes turns in a process of its own; what is
done is kept in a folder (--state), and a later run goes on from there. A process that dies is told
with the case that it was at, and the next one goes on after it. Ends with the smallest form of each
case that failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .cases import EIGHT_BITS, Case, SizeTable, random_case, short, smaller, sweep

SLICE_SECONDS = 120.0
MOST_SHRINKS, MOST_CRASHES = 400, 40


def worker(args: argparse.Namespace) -> int:
    """Runs cases at one instruction set and writes a line for each: before it, and after it."""
    import torch
    from bench.harness.dev import moe_ops_dev

    from moe_ops import _library

    from .checks import fault_of

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    if _library.cpu_isa() != args.isa:
        print(f"asked for {args.isa}, got {_library.cpu_isa()}", file=sys.stderr)
        return 2
    if args.shrink:

        def told(case: Case) -> str:
            print(json.dumps({"case": str(case)}), flush=True)
            fault = fault_of(case)
            print(json.dumps({"of": str(case), "fault": fault}), flush=True)
            return fault

        first = Case.of(args.cases[0])
        if fault := told(first):
            shrink(first, fault, told)
        return 0
    table = moe_ops_dev.block_sizes()
    out = open(args.log, "a", buffering=1) if args.log else sys.stdout
    end = time.monotonic() + args.seconds if args.seconds else float("inf")
    for at, case in enumerate(cases_of(args, table)):
        if at < args.skip:
            continue
        if time.monotonic() > end:
            return 0
        print(json.dumps({"at": at, "case": str(case)}), file=out)
        fault = fault_of(case)
        print(json.dumps({"at": at, "fault": fault}), file=out)
    print(json.dumps({"done": True}), file=out)
    return 0


def cases_of(args: argparse.Namespace, table):
    """Those that a worker runs, always the same for the same arguments."""
    if args.cases:
        return (Case.of(text) for text in args.cases)
    if args.random:
        rng = random.Random(f"{args.seed} {args.isa}")
        return (random_case(table, rng, args.ops) for _ in range(10**9))
    if args.short:
        return (c for c in short(table, args.seed) if not args.own or has_own(args.isa, c))
    cases = list(sweep(table, args.ops))
    # In an order that reaches every op, type and axis early, and is the same every time.
    random.Random(args.seed).shuffle(cases)
    return iter(cases)


def has_own(isa: str, case: Case) -> bool:
    """Returns False if the case runs kernels of a higher instruction set of this machine."""
    from tests.helpers.isas import has_own_kernels

    from .checks import DTYPES

    return has_own_kernels(isa, DTYPES[case["dtype"]], case["op"] in EIGHT_BITS)


def environment(isa: str) -> dict[str, str]:
    return {**os.environ, "MOE_OPS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}


def spawn(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.sweep", "--worker", "--isa", isa, *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(
        command, cwd=root, env=environment(isa), capture_output=True, text=True, check=False
    )


def shrink(case: Case, fault: str, fault_of: Callable[[Case], str]) -> tuple[Case, str]:
    """The smallest case found that is still at fault, one step after the other."""
    tries = 0
    while tries < MOST_SHRINKS:
        for candidate in smaller(case):
            tries += 1
            if again := fault_of(candidate):
                case, fault = candidate, again
                break
        else:
            break
    return case, fault


def shrunk(isa: str, case: Case) -> tuple[Case, str]:
    """Shrinks a case in processes of its own, in which a crash is a fault too."""
    fault = ""
    for _ in range(MOST_CRASHES):
        run = spawn(isa, "--shrink", str(case))
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        for before, line in itertools.pairwise([*lines, {}]):
            if before.get("fault"):
                case, fault = Case.of(before["of"]), before["fault"]
            elif "case" in before and "fault" not in line:  # it died there
                case = Case.of(before["case"])
                fault = f"the process ended with {run.returncode}: {run.stderr.strip()[-300:]}"
        if run.returncode == 0:
            break
    return case, fault or "failed once, and not when it was run by itself"


class State:
    """A record of what is done, kept in a folder: of each instruction set a log and how far it
    came. Other sizes or another text of cases.py make another file, since they make other cases."""

    def __init__(self, folder: Path, seed: int, table: SizeTable) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        text = Path(__file__).with_name("cases.py").read_text() + repr(sorted(table))
        self.path = folder / f"state-{seed}-{zlib.crc32(text.encode()):08x}.json"
        self.values: dict = json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, isa: str) -> dict:
        empty = {"phase": "sweep", "next": 0, "cases": {}, "failed": []}
        return self.values.setdefault(isa, empty)

    def save(self) -> None:
        whole = self.path.with_suffix(".new")
        whole.write_text(json.dumps(self.values, indent=1))
        whole.replace(self.path)


def run_slice(isa: str, state: State, seconds: float, args: argparse.Namespace) -> None:
    """One process at one instruction set for so many seconds."""
    own = state.of(isa)
    log = state.folder / f"log-{isa}.txt"
    log.unlink(missing_ok=True)
    extra = ["--random"] if own["phase"] == "random" else []
    ops = ["--ops", ",".join(args.ops)] if args.ops else []
    run = spawn(
        isa, "--log", str(log.resolve()), "--seconds", str(seconds), "--skip", str(own["next"]),
        "--seed", str(args.seed), *extra, *ops,
    )  # fmt: skip
    counts = Counter(own["cases"])
    running = None
    for line in log.read_text().splitlines() if log.exists() else []:
        entry = json.loads(line)
        if "case" in entry:
            running = Case.of(entry["case"])
        elif "fault" in entry and running is not None:
            own["next"] = entry["at"] + 1
            counts[f"{running['op']} {running['dtype']}"] += 1
            if entry["fault"]:
                own["failed"].append({"case": str(running), "fault": entry["fault"]})
                print(f"{isa}: {running}\n    {entry['fault']}", flush=True)
            running = None
        elif entry.get("done"):
            own.update(phase="random", next=0)
    if run.returncode != 0:
        what = f"the process ended with {run.returncode}: {run.stderr.strip()[-300:]}"
        if running is None:
            raise RuntimeError(f"{isa}: {what}")
        own["failed"].append({"case": str(running), "fault": what})
        counts[f"{running['op']} {running['dtype']}"] += 1
        own["next"] += 1
        print(f"{isa}: {running}\n    {what}", flush=True)
    own["cases"] = dict(counts)
    state.save()


def fuzz(args: argparse.Namespace) -> int:
    from bench.harness.dev import moe_ops_dev

    from moe_ops import _library

    state = State(Path(args.state), args.seed, moe_ops_dev.block_sizes())
    levels = [args.isa] if args.isa else list(_library.supported_isas())
    end = time.monotonic() + 60 * args.minutes
    while (left := end - time.monotonic()) > 1:
        # The level that has run least, those whose sweep is not over first.
        isa = min(levels, key=lambda i: (state.of(i)["phase"], sum(state.of(i)["cases"].values())))
        isa = min(
            (i for i in levels if state.of(i)["phase"] == "sweep"),
            key=lambda i: state.of(i)["next"],
            default=isa,
        )
        run_slice(isa, state, min(left, SLICE_SECONDS), args)
    return report(state, levels, args)


def report(state: State, levels: list[str], args: argparse.Namespace) -> int:
    failed = [(isa, f) for isa in levels for f in state.of(isa)["failed"]]
    print(f"{'op':24}{'dtype':7}" + "".join(f"{isa:>13}" for isa in levels))
    keys = sorted({key for isa in levels for key in state.of(isa)["cases"]})
    for key in keys:
        op, dtype = key.split()
        counts = "".join(f"{state.of(isa)['cases'].get(key, 0):13}" for isa in levels)
        print(f"{op:24}{dtype:7}{counts}")
    totals = [sum(state.of(isa)["cases"].values()) for isa in levels]
    print(f"{'all':31}" + "".join(f"{n:13}" for n in totals))
    for isa in levels:
        if state.of(isa)["phase"] == "sweep":
            print(f"{isa}: the sweep is not over; run again to go on.")
    print(f"{sum(totals)} cases, {len(failed)} failed.")
    seen = set()
    for isa, failure in failed:
        case = Case.of(failure["case"])
        if (isa, case["op"], case["dtype"]) in seen or args.no_shrink:
            continue
        seen.add((isa, case["op"], case["dtype"]))
        smallest, fault = shrunk(isa, case)
        print(f'smallest, {isa}: "{smallest}"\n    {fault}', flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("cases", nargs="*", help="cases to run, instead of all")
    parser.add_argument("--isa", default="", help="an instruction set, instead of all")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ops", type=lambda s: s.split(","), default=[], help="a,b: only these ops"
    )
    parser.add_argument("--state", default="build/fuzz", help="where what is done is kept")
    parser.add_argument("--short", action="store_true", help="a part that takes seconds")
    parser.add_argument("--no-shrink", action="store_true")
    for hidden in ("--worker", "--random", "--shrink", "--own"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    for name, kind, default in (("--log", str, ""), ("--seconds", float, 0), ("--skip", int, 0)):
        parser.add_argument(name, type=kind, default=default, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if not args.cases and not args.short:
        return fuzz(args)
    from moe_ops import _library

    bad = 0
    for isa in [args.isa] if args.isa else _library.supported_isas():
        run = spawn(isa, *args.cases, *(["--short"] if args.short else []))
        running, count = "", 0
        for line in run.stdout.splitlines():
            entry = json.loads(line)
            running = entry.get("case", running)
            count += "fault" in entry
            if entry.get("fault"):
                bad += 1
                print(f'{isa}: "{running}"\n    {entry["fault"]}')
        if run.returncode != 0:
            bad += 1
            print(f'{isa}: the process ended with {run.returncode} at "{running}"\n{run.stderr}')
        print(f"{isa}: {count} cases")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

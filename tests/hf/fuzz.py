"""python -m tests.hf.fuzz: whole models of all families, with random sizes and options, optimized.

    python -m tests.hf.fuzz --minutes 10 --seed 1        # a part of make fuzz
    python -m tests.hf.fuzz 'family=olmoe seed=3 modes=none scale_norms=3.0 clip_qkv=8.0'

Without a draw, first every option of every family has its turn alone, then draws are random. A
worker process runs them; the folder --state keeps what is done, and a later run goes on from there.
If a worker dies, its draw counts as failed and the next worker goes on after it. Ends with the
smallest form of the first failure of each family, a line that can be run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SLICE_SECONDS = 120.0
MOST_SHRINKS = 60


def draws_of(phase: str, seed: int) -> Iterator:
    """Yields the draws of a phase, always the same ones for a seed."""
    from .fuzz_draws import one_at_a_time, random_draw

    if phase == "options":
        yield from one_at_a_time(seed)
        return
    rng = random.Random(seed)
    while True:
        yield random_draw(rng)


def outcome_of(draw) -> dict[str, str]:
    """Returns the fault of a draw, or why there is nothing to compare."""
    from .fuzz_checks import Refused, fault_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return {"fault": fault_of(draw)}
        except Refused as error:
            return {"fault": "", "refused": str(error)}


def shrunk(draw, fault: str):
    """Returns the simplest draw found that still fails, and its fault."""
    from .fuzz_draws import simpler

    tries, found = 0, True
    while found:
        found = False
        for candidate in simpler(draw):
            tries += 1
            if tries > MOST_SHRINKS:
                return draw, fault
            if again := outcome_of(candidate)["fault"]:
                draw, fault, found = candidate, again, True
                break
    return draw, fault


def quiet() -> None:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)


def worker(args: argparse.Namespace) -> int:
    """Runs draws and writes a line before each and one after it."""
    quiet()
    end = time.monotonic() + args.seconds
    with open(args.log, "a", buffering=1) as out:
        for at, draw in enumerate(draws_of(args.phase, args.seed)):
            if at < args.skip:
                continue
            if time.monotonic() > end:
                return 0
            print(json.dumps({"at": at, "draw": str(draw)}), file=out)
            print(json.dumps({"at": at, **outcome_of(draw)}), file=out)
        print(json.dumps({"done": True}), file=out)
    return 0


class State:
    """The progress of a seed, kept in a folder. Other texts of the draws make another file."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        here = Path(__file__)
        names = ("fuzz_draws.py", "families.py", "family_configs.py")
        text = "".join(here.with_name(name).read_text() for name in names)
        self.path = folder / f"hf-{seed}-{zlib.crc32(text.encode()):08x}.json"
        self.log = folder / f"hf-log-{seed}.txt"
        empty = {"phase": "options", "next": 0, "draws": {}, "refused": {}, "failed": []}
        self.values = json.loads(self.path.read_text()) if self.path.exists() else empty

    def save(self) -> None:
        whole = self.path.with_suffix(".new")
        whole.write_text(json.dumps(self.values, indent=1))
        whole.replace(self.path)


def run_slice(state: State, seconds: float, seed: int) -> None:
    """Runs one worker for that many seconds and keeps what it did."""
    own = state.values
    state.log.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.hf.fuzz", "--worker",
               "--log", str(state.log.resolve()), "--seconds", str(seconds), "--seed", str(seed),
               "--skip", str(own["next"]), "--phase", own["phase"]]  # fmt: skip
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    draws, refused = Counter(own["draws"]), Counter(own["refused"])
    running = ""

    def finish(fault: str) -> None:
        draws[running.split()[0].removeprefix("family=")] += 1
        if fault:
            own["failed"].append({"draw": running, "fault": fault})
            print(f"'{running}'\n    {fault}", flush=True)

    for line in state.log.read_text().splitlines() if state.log.exists() else []:
        entry = json.loads(line)
        if "draw" in entry:
            running = entry["draw"]
        elif "fault" in entry:
            finish(entry["fault"])
            refused[running.split()[0].removeprefix("family=")] += "refused" in entry
            own["next"], running = entry["at"] + 1, ""
        elif entry.get("done"):
            own.update(phase="random", next=0)
    if run.returncode != 0:
        what = f"the process ended with {run.returncode}: {run.stderr.strip()[-300:]}"
        if not running:
            raise RuntimeError(what)
        finish(what)
        own["next"] += 1
    own.update(draws=dict(draws), refused=dict(refused))
    state.save()


def report(state: State, shrink: bool) -> int:
    from .fuzz_draws import Draw

    own = state.values
    total, refused = sum(own["draws"].values()), sum(own["refused"].values())
    print(f"{total} draws, {refused} of them refused, {len(own['failed'])} failed.")
    failed = Counter(f["draw"].split()[0].removeprefix("family=") for f in own["failed"])
    if failed:
        print("Failures by family: " + ", ".join(f"{k} {n}" for k, n in failed.most_common()))
    if own["phase"] == "options":
        print(f"Draw {own['next']} of the options alone; run again to go on.")
    seen = set()
    quiet()
    for failure in own["failed"]:
        draw, fault = Draw.of(failure["draw"]), failure["fault"]
        if draw.family in seen or not shrink or fault.startswith("the process"):
            continue
        seen.add(draw.family)
        smallest, fault = shrunk(draw, fault)
        print(f"smallest: '{smallest}'\n    {fault}", flush=True)
    return 1 if own["failed"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hf.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("draws", nargs="*", help="draws to run, instead of all")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", default="build/fuzz", help="where what is done is kept")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--random", action="store_true", help="leave out the options alone")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("--log", str), ("--phase", str), ("--seconds", float), ("--skip", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.draws:
        from .fuzz_draws import Draw

        quiet()
        outcomes = [(text, outcome_of(Draw.of(text))) for text in args.draws]
        for text, outcome in outcomes:
            said = (
                outcome["fault"] or f"refused: {outcome['refused']}" if "refused" in outcome else ""
            )
            print(f"'{text}'\n    {outcome['fault'] or said or 'passed'}")
        return int(any(outcome["fault"] for _, outcome in outcomes))
    state = State(Path(args.state), args.seed)
    if args.random and state.values["phase"] == "options":
        state.values.update(phase="random", next=0)
    end = time.monotonic() + 60 * args.minutes
    while (left := end - time.monotonic()) > 1:
        run_slice(state, min(left, SLICE_SECONDS), args.seed)
    return report(state, not args.no_shrink)


if __name__ == "__main__":
    sys.exit(main())

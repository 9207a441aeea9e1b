"""The command line of every experiment: ``python -m bench.experiments.NAME --seeds 3 [--save]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.harness.arguments import whole

from . import page
from .report import Report


def main(system: str, run: Callable[..., Report], arguments: Sequence[str] | None = None) -> Report:
    """Runs the experiment of a system and prints what it shows.

    A page that the result cannot be written to ends the process before the run, with one sentence.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.experiments.{system}")
    parser.add_argument(
        "--seeds", type=whole(1, 10_000), default=3, help="number of paired seeds: 0, 1, ..."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--save", action="store_true", help="write numbers, tables and pictures into the tree"
    )
    options: Any = parser.parse_args(arguments)
    if options.save:
        try:
            page.check(system)
        except ValueError as error:
            sys.exit(f"{parser.prog}: {error}")
    started = time.perf_counter()

    def log(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    report = run(seeds=range(options.seeds), log=log)
    report.setting["Took"] = f"{time.perf_counter() - started:.0f} s"
    if options.save:
        for path in page.save(report):
            log(f"wrote {path}")
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.markdown())
    return report

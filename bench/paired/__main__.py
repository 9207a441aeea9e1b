"""Compares two builds of moe_ops: ``python -m bench.paired BASE_PYTHONPATH NEW_PYTHONPATH``.

Each build is a folder for PYTHONPATH that holds the package moe_ops with its libraries. Every round
runs all cells of either build, first of the one and then of the other, in the order that
`interleave` gives, each cell in a process that no other cell has left its traces in. A process has
one thread, and its time is that thread's on a core, so that other work on the machine counts
little. A cell is flagged where the median over rounds of the ratio
new to base and the ratio of the best times are both further from one than the tolerance. The status
is 1 if a cell is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.arguments import whole
from bench.paired import cells
from moe_ops._files import write_json
from moe_ops.bench.machine import ISA_ENVIRONMENTS
from moe_ops.bench.report import table
from moe_ops.bench.timing import Samples, interleave, speedup

TOLERANCE = 0.03
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@dataclass
class Cell:
    """The samples of one cell in both builds, in seconds, or why a build has none."""

    samples: dict[str, Samples] = field(
        default_factory=lambda: {"base": Samples(), "new": Samples()}
    )
    problem: str = ""

    @property
    def ratio(self) -> float:
        """Median over rounds of new / base."""
        return speedup(self.samples, "base", "new")

    @property
    def best_ratio(self) -> float:
        base, new = (min(self.samples[build].seconds.values()) for build in ("base", "new"))
        return new / base

    @property
    def verdict(self) -> str:
        if self.problem:
            return self.problem
        low, high = sorted((self.ratio, self.best_ratio))
        return "SLOWER" if low > 1 + TOLERANCE else "faster" if high < 1 - TOLERANCE else ""


def compare(
    builds: dict[str, Path], words: list[str], rounds: int, environment: dict[str, str]
) -> dict[str, Cell]:
    """The cells chosen by `words` (all without any) in the builds "base" and "new"."""
    found: dict[str, Cell] = {}

    def sample(build: str, number: int) -> None:
        print(f"round {number + 1} of {rounds}: {build}", file=sys.stderr, flush=True)
        for name, value in run_cells(builds[build], words, environment).items():
            cell = found.setdefault(name, Cell())
            if isinstance(value, str):
                cell.problem = f"{build}: {value}"
            else:
                cell.samples[build].seconds[number] = value * 1e-9

    interleave(list(builds), sample, lambda number: number < rounds)
    return found


def run_cells(build: Path, words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Nanoseconds of each cell, or why it cannot run.

    Raises:
        ValueError: the process failed, or moe_ops was found elsewhere.
    """
    child = subprocess.run(
        [sys.executable, cells.__file__, *words],
        env={**os.environ, **THREADS, **environment, "PYTHONPATH": str(build)},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise ValueError(f"{build} must hold a build of moe_ops that runs, got: {last}")
    result = json.loads(child.stdout)
    if not Path(result["moe_ops"]).is_relative_to(build):
        raise ValueError(f"{build} must hold the package moe_ops, got {result['moe_ops']}")
    return dict(result["cells"])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paired",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", type=Path, metavar="BASE_PYTHONPATH")
    parser.add_argument("new", type=Path, metavar="NEW_PYTHONPATH")
    parser.add_argument("--cells", default="", help="words, one of which a cell's name must have")
    parser.add_argument("--rounds", type=whole(1, 1000), default=5)
    parser.add_argument("--isa", choices=ISA_ENVIRONMENTS, help="hold both builds to it")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all samples there")
    options = parser.parse_args()
    words = [word for word in options.cells.split(",") if word]
    names = cells.chosen(words)
    if not names:
        sys.exit(f"bench.paired: --cells must be words of names of cells, got {options.cells!r}")
    if options.list:
        print("\n".join(names))
        return 0
    builds = {"base": options.base.resolve(), "new": options.new.resolve()}
    try:
        found = compare(builds, words, options.rounds, ISA_ENVIRONMENTS.get(options.isa, {}))
    except ValueError as error:
        sys.exit(f"bench.paired: {error}")
    print(render(found))
    if options.json:
        write_json(
            options.json,
            {
                name: {build: list(s.seconds.values()) for build, s in cell.samples.items()}
                for name, cell in found.items()
            },
        )
    return 1 if any(cell.verdict == "SLOWER" for cell in found.values()) else 0


def render(found: dict[str, Cell]) -> str:
    rows = []
    for name, cell in found.items():
        numbers = ["–", "–", "–"]
        if not cell.problem:
            base = cell.samples["base"].median * 1e6
            numbers = [f"{base:.1f}", f"{cell.ratio:.3f}", f"{cell.best_ratio:.3f}"]
        rows.append([name, *numbers, cell.verdict])
    return table(["cell", "base us", "new / base", "of the best", ""], rows)


if __name__ == "__main__":
    sys.exit(main())

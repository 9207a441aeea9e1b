"""Compares two builds of moe_ops: ``python -m bench.paired BASE_PYTHONPATH NEW_PYTHONPATH``.

Each build is a folder for PYTHONPATH that contains the package moe_ops with its libraries. Each
build has a process, a new one per round, which forks for each cell, so that no cell is affected by
another. A cell runs in one build and immediately in the other, since the speed of a machine drifts;
the order alternates from cell to cell and from round to round. A process has one thread and is
measured by its thread CPU time, which other work on the machine affects little. A cell is flagged
if the median over rounds of the ratio new to base and the ratio of the best times are both further
from one than the tolerance. The status is 1 if a cell is slower.

Memory pages differ between processes, which alone changes some cells by several percent: compare a
build with itself to find these, and trust a cell that is flagged in several runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
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
    """Samples of one cell in both builds, in seconds, or the reason why a build has none."""

    samples: dict[str, Samples] = field(
        default_factory=lambda: {"base": Samples(), "new": Samples()}
    )
    problem: str = ""

    @property
    def ratio(self) -> float:
        """Returns the median over rounds of new / base."""
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


class Build:
    """Process of one build: `cells` run as a script. It is a context manager that ends the
    process."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, cells.__file__],
            env={**os.environ, **THREADS, **environment, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Build:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def check(self) -> None:
        """Raises ValueError if the process failed, or moe_ops was imported from elsewhere."""
        found = self._answer()
        if not Path(found).is_relative_to(self.folder):
            raise ValueError(f"{self.folder} must hold the package moe_ops, got {found}")

    def measure(self, cell: str) -> float | str:
        """Returns nanoseconds of a cell, or the reason why it cannot run.

        Raises:
            ValueError: the process failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{cell}\n")
        self._process.stdin.flush()
        answer: float | str = self._answer()
        return answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        _, errors = self._process.communicate()
        last = (errors.strip().splitlines() or ["it ended without a word"])[-1]
        raise ValueError(f"{self.folder} must hold a build of moe_ops that runs, got: {last}")


def compare(
    folders: dict[str, Path], names: list[str], rounds: int, environment: dict[str, str]
) -> dict[str, Cell]:
    """Measures the cells `names` in the builds "base" and "new"."""
    found = {name: Cell() for name in names}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        with ExitStack() as stack:
            builds = {
                name: stack.enter_context(Build(folder, environment))
                for name, folder in folders.items()
            }
            for build in builds.values():
                build.check()

            def sample(key: str, place: int, builds: Any = builds, number: int = number) -> None:
                cell = found[names[place]]
                value = builds[key].measure(names[place])
                if isinstance(value, str):
                    cell.problem = f"{key}: {value}"
                else:
                    cell.samples[key].seconds[number] = value * 1e-9

            keys = list(builds) if number % 2 == 0 else list(builds)[::-1]
            interleave(keys, sample, lambda place: place < len(names))
    return found


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
        found = compare(builds, names, options.rounds, ISA_ENVIRONMENTS.get(options.isa, {}))
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

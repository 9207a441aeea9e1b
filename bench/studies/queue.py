"""The runs of studies, in the order of their ranks, side by side on the cores there are.

A result is written as soon as a run ends, to bench/studies/results; the state of a run that is
cut lies in a folder of checkpoints. Whoever starts the queue again, after a kill or with another
number of processes, gets the numbers of a queue that was never cut: a run depends on its name and
seed alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moe_ops._files import make_folder, write_text

from . import registry
from .study import Paused, Run, Study

try:
    import fcntl
except ImportError:  # No POSIX system: two queues at once are not noticed.
    fcntl = None  # type: ignore[assignment]

RESULTS = Path(__file__).resolve().parent / "results"
CHECKPOINTS = Path("runs/studies")


class Busy(ValueError):
    """Another process has the folder."""


class Store:
    """The results of a study, in a file. Its plan is in it too, as it was at the first run.

    Raises:
        ValueError: the file's runs were made under another plan than the study has now.
    """

    def __init__(self, study: Study, folder: Path = RESULTS) -> None:
        self.study, self.path = study, folder / f"{study.name}.json"
        # What JSON makes of it, so that it equals what is read.
        fixed = json.loads(json.dumps(study.fixed()))
        self.data: dict[str, Any] = {"study": study.name, "fixed": fixed, "runs": {}}
        if self.path.is_file():
            self.data = json.loads(self.path.read_text("utf-8"))
            if self.data["fixed"] != fixed:
                differ = [k for k in fixed if self.data["fixed"].get(k) != fixed[k]]
                raise ValueError(
                    f"{self.path} must hold runs of the study as it is, got another plan of its "
                    f"{' and '.join(differ)}; a changed study needs a new name."
                )

    def find(self, run: str, seed: int) -> dict[str, Any] | None:
        return self.data["runs"].get(run, {}).get(str(seed))

    def add(self, run: str, seed: int, result: Mapping[str, Any]) -> None:
        self.data["runs"].setdefault(run, {})[str(seed)] = result
        self.data["machine"] = machine()
        make_folder(self.path.parent)
        write_text(self.path, self.text())

    def text(self) -> str:
        """The file: JSON with a line per run."""
        rest = {key: value for key, value in self.data.items() if key != "runs"}
        runs = []
        for run, found in self.data["runs"].items():
            lines = [f'   "{seed}": {json.dumps(result)}' for seed, result in found.items()]
            runs.append(f"  {json.dumps(run)}: {{\n" + ",\n".join(lines) + "\n  }")
        head = json.dumps(rest, indent=1).removesuffix("\n}")
        return f'{head},\n "runs": {{\n' + ",\n".join(runs) + "\n }\n}\n"

    def missing(self) -> list[tuple[str, int]]:
        """Runs to do, seed by seed, so that pairs are whole early."""
        every = [(run, seed) for seed in self.study.numbers for run in self.study.runs]
        return [pair for pair in every if self.find(*pair) is None]

    def minutes(self) -> float:
        """Returns the minutes of processor time a run: the mean of the runs that are done, or else
        the study's estimate."""
        done = [r["seconds"] for found in self.data["runs"].values() for r in found.values()]
        return sum(done) / len(done) / 60 if done else self.study.minutes


def machine() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).split(":", 1)[1]
    return (
        f"one thread of {' '.join(name.split())}, torch {torch.__version__}, Python "
        f"{platform.python_version()}"
    )


@dataclass(frozen=True)
class Item:
    """A run of the queue."""

    study: str
    run: str
    seed: int

    def __str__(self) -> str:
        return f"{self.study}, {self.run}, seed {self.seed}"

    def checkpoint(self, folder: Path) -> Path:
        run = "".join(c if c.isalnum() else "-" for c in self.run)
        return folder / self.study / f"{run}-{self.seed}.pt"


def perform(
    item: Item, folder: Path | None, seconds: float, parent: int | None = None
) -> dict[str, Any] | None:
    """One run with one thread; its result as JSON gives it back, None if the time was over."""
    torch.set_num_threads(1)

    def tell(share: float, left: float) -> None:
        print(f"  {item}: {share:.0%}, about {left / 60:.1f} min left", flush=True)

    deadline = time.monotonic() + seconds
    run = Run(item.checkpoint(folder) if folder else None, deadline, tell, parent)
    try:
        result = registry.study(item.study).runs[item.run](item.seed, run)
    except Paused:
        return None
    found = json.loads(json.dumps({**result, "seconds": round(run.seconds, 1)}, allow_nan=False))
    run.clear()
    return found


def work(
    studies: Sequence[Study],
    *,
    hours: float,
    jobs: int,
    folder: Path = CHECKPOINTS,
    results: Path = RESULTS,
    log: Callable[[str], None] = print,
) -> int:
    """Does what is missing, for so long; returns the number of runs that are still missing.

    Raises:
        ValueError: results of another plan, or a second queue in the same folder.
    """
    deadline = time.monotonic() + 3600 * hours
    stores = {s.name: Store(s, results) for s in sorted(studies, key=lambda s: s.rank)}
    todo = [Item(name, *pair) for name, store in stores.items() for pair in store.missing()]
    total = len(todo)
    log(f"{total} runs to do, {remaining(stores, jobs)} with {jobs} at a time")

    def finish(item: Item, result: dict[str, Any] | None) -> bool:
        if result is None:
            log(f"{item}: paused")
            return False
        stores[item.study].add(item.run, item.seed, result)
        left = sum(len(store.missing()) for store in stores.values())
        log(f"{item}: {result['seconds']:.0f} s; {left} runs, {remaining(stores, jobs)}")
        return True

    with only_one(folder):
        if jobs == 1:
            for item in todo:
                seconds = deadline - time.monotonic()
                if seconds <= 0 or not finish(item, perform(item, folder, seconds)):
                    break
        else:
            _side_by_side(todo, deadline, jobs, folder, finish)
    return sum(len(store.missing()) for store in stores.values())


def _side_by_side(
    todo: Sequence[Item],
    deadline: float,
    jobs: int,
    folder: Path,
    finish: Callable[[Item, dict[str, Any] | None], bool],
) -> None:
    items = iter(todo)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running: dict[Future[dict[str, Any] | None], Item] = {}
        while True:
            while len(running) < jobs and (seconds := deadline - time.monotonic()) > 0:
                item = next(items, None)
                if item is None:
                    break
                running[pool.submit(perform, item, folder, seconds, os.getpid())] = item
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                finish(running.pop(done), done.result())


def remaining(stores: Mapping[str, Store], jobs: int) -> str:
    """Returns how long the missing runs take if every job has a core."""
    minutes = sum(len(s.missing()) * s.minutes() for s in stores.values()) / jobs
    if minutes < 90:
        return f"about {minutes:.0f} min left"
    return f"about {minutes / 60:.1f} h left"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process.

    Raises:
        Busy: another process holds it.
    """
    make_folder(folder)
    with (folder / "lock").open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Busy(
                    f"{folder} must be of one process at a time, got a second one."
                ) from None
        yield

"""The process of a step: ``python -m bench.gpu.lease.child PROGRAM STEP``.

It ends with status 0, 1 on failure, or 3 if the time was too short for everything; its last line
summarizes the results.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu.lease.journal import Journal

UNFINISHED = 3
PROGRAMS = (
    "machine",
    "smoke",
    "tiles",
    "measure",
    "decode",
    "stream",
    "cached",
    "small",
    "result",
)


@dataclass(frozen=True)
class Task:
    """Step as seen by its process."""

    step: str
    journal: Journal
    out: Path
    seconds: float
    dry: bool

    @property
    def device(self) -> str:
        """Returns "cuda", or "cpu" in a run without a GPU."""
        return "cpu" if self.dry and not torch.cuda.is_available() else "cuda"

    def wait(self) -> None:
        """Waits for all work on the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.lease.child")
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("step")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args(arguments)
    if given.dry and importlib.util.find_spec("torch_cuda"):
        # On a simulator, torch's own kernels run on the CPU.
        importlib.import_module("tests.cuda_torch.simulated")
    task = Task(given.step, Journal(given.out), given.out, given.seconds, given.dry)
    if task.device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device.")
        return 1
    if given.program == "small":
        return _small(task)
    program = importlib.import_module(f"bench.gpu.lease.{given.program}")
    status, text = program.run(task)
    print(text)
    return int(status)


def _small(task: Task) -> int:
    """Runs the calls that compute-sanitizer checks."""
    from bench.gpu import small

    wrong = small.run(task.device)
    print("; ".join(wrong) or "every op agrees with its reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    status = main()
    if "torch_cuda" in sys.modules:
        # The simulator's versions of torch kernels are Python, in autograd threads too; one that
        # still waits for the interpreter at exit would abort the process.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)

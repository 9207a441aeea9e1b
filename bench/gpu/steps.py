"""Steps before measuring: building, the op tests, compute-sanitizer. Needs no torch.

Each step is a command with a time limit and a log in build/gpu; its outcome is a dict for the
report: status (passed, failed, unfinished, skipped), seconds, and a sentence.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness.files import ROOT

LOGS = ROOT / "build" / "gpu"
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"
# An exit status that none of our Python programs uses.
_SANITIZER_ERROR = 86
# Time for a process to finish its output after SIGINT.
_GRACE_S = 10.0

Outcome = dict[str, Any]


def build_command() -> list[str]:
    return ["make", "build", "MOE_OPS_CUDA=on"]


def op_test_command(python: str) -> list[str]:
    return [python, "-m", "pytest", "tests/ops", "--backend", "cuda", "--tb=short"]


def sanitizer_command(python: str, tool: str, sanitizer: str) -> list[str]:
    return [
        sanitizer,
        f"--tool={tool}",
        f"--error-exitcode={_SANITIZER_ERROR}",
        "--target-processes=all",
        python,
        "-m",
        "bench.gpu.small",
    ]


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{p}/bin" for p in places if p)])
    return shutil.which("compute-sanitizer", path=path)


def build(limit_s: float) -> Outcome:
    """Installs the package with CUDA kernels into ./.venv."""
    status, seconds, log = run_logged("build", build_command(), limit_s)
    if status == 0:
        return _outcome("passed", seconds, "built into ./.venv with MOE_OPS_CUDA=on")
    if status is None:
        words = (
            f"the build takes more than {limit_s:.0f} s here: run `{' '.join(build_command())}` "
        )
        return _outcome("unfinished", seconds, words + "first; the command then finds it done")
    lines = log.read_text(errors="replace").strip().splitlines()
    return _outcome("failed", seconds, f"make build failed: {lines[-1] if lines else '?'} ({log})")


def op_tests(limit_s: float) -> Outcome:
    """Runs tests/ops on the GPU."""
    status, seconds, log = run_logged("tests", op_test_command(sys.executable), limit_s)
    counts = test_counts(log.read_text(errors="replace"))
    text = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no result"
    if status is None:
        word = "failed" if counts.get("failed") or counts.get("error") else "unfinished"
        return _outcome(word, seconds, f"{text} when the time was up", counts=counts)
    good = status == 0 and counts.get("passed", 0) > 0
    return _outcome("passed" if good else "failed", seconds, text, counts=counts)


def sanitize(tool: str, limit_s: float) -> Outcome:
    """Runs memcheck or racecheck over `small`: every op once, forward and backward."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return _outcome("skipped", 0.0, "compute-sanitizer is not installed")
    command = sanitizer_command(sys.executable, tool, sanitizer)
    # Every tensor gets its own allocation, so that an access past its end is out of bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, seconds, log = run_logged(tool, command, limit_s, environment)
    text = log.read_text(errors="replace")
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, re.MULTILINE)
    said = summaries[-1] if summaries else f"exit status {status} ({log})"
    if status is None:
        return _outcome("unfinished", seconds, f"took more than {limit_s:.0f} s")
    return _outcome("passed" if status == 0 and summaries else "failed", seconds, said)


def log_of(name: str) -> Path:
    return LOGS / f"{name}.log"


def run_logged(
    name: str, command: Sequence[str], limit_s: float, environment: Mapping[str, str] = {}
) -> tuple[int | None, float, Path]:
    """Returns (exit status, or None at the time limit; seconds; log)."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = log_of(name)
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        status: int | None
        try:
            status = process.wait(max(0.1, limit_s))
        except subprocess.TimeoutExpired:
            status = None
            _end(process)
        except BaseException:
            _end(process)
            raise
    return status, time.perf_counter() - started, log


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts the process and its children, as Ctrl-C does; then kills them."""
    for what, wait_s in ((signal.SIGINT, _GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, what)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return


def test_counts(log: str) -> dict[str, int]:
    """Parses the counts of pytest's last summary: {"passed": 812, "failed": 1, ...}."""
    for line in reversed(log.splitlines()):
        found = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", line)
        if found and " in " in line:
            return {
                what.removesuffix("s") if what == "errors" else what: int(n) for n, what in found
            }
    return {}


def _outcome(status: str, seconds: float, text: str, **more: Any) -> Outcome:
    return {"status": status, "seconds": round(seconds, 1), "text": text, **more}


def said(command: list[str]) -> list[str]:
    """Returns a tool's output lines; none if it is missing or fails."""
    folder = "/usr/local/cuda/bin"
    path = shutil.which(command[0], path=os.pathsep.join([os.environ.get("PATH", ""), folder]))
    if path is None:
        return []
    try:
        done = subprocess.run(
            [path, *command[1:]], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines()

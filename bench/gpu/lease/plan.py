"""The steps of a lease, in order, each with its time limit."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu import steps
from bench.gpu.lease import build
from bench.gpu.lease.build import Sources
from bench.gpu.lease.journal import Journal
from bench.gpu.steps import Outcome
from bench.harness.files import ROOT

# Seconds that a measuring child reserves: it begins no case that would take longer.
_CHILD_RESERVE_S = 15.0
# Failing tests listed in an outcome.
_TOLD = 20


@dataclass(frozen=True)
class Lease:
    """Options of the command. `dry`: tiny layers, also without a GPU. `peers`: a folder with the
    sources of other libraries."""

    out: Path
    sources: Sources = field(default_factory=Sources)
    dry: bool = False
    peers: Path | None = None

    @property
    def journal(self) -> Journal:
        return Journal(self.out)


@dataclass(frozen=True)
class Step:
    """Step of a lease. `limit_s`: time limit. `least_s`: minimum remaining time to start. `stays`:
    returns whether the output of a passed step still exists."""

    name: str
    limit_s: float
    run: Callable[[Lease, float, str], Outcome]
    least_s: float = 15.0
    needs_build: bool = True
    stays: Callable[[Lease], bool] = lambda lease: True


# Groups of tests, most important first.
TESTS: dict[str, tuple[str, ...]] = {
    "tests_routers": ("topk_router", "topp_router", "expert_choice_router", "sort_by_expert"),
    "tests_products": ("grouped_gemm", "grouped_sum", "permute", "unpermute", "gated_act"),
    "tests_ffn": ("moe_ffn",),
    "tests_attention": ("moa_attention", "moe_linear"),
    "tests_rest": (),
    "tests_torch": ("cuda_torch",),
}
# Seconds of each selection of bench.gpu.lease.measure.
MEASURED = {
    **{"block": 150.0, "half": 60.0, "fp8": 60.0, "quantized": 90.0},
    **{"stored": 60.0, "ops": 60.0, "attention": 60.0},
}


def steps_of_a_lease() -> list[Step]:
    """Returns all steps; compute-sanitizer is last, because it is slow and finds rare errors."""
    return [
        Step("machine", 60, child("machine"), least_s=5, needs_build=False),
        Step("build", 420, _build, 30, needs_build=False, stays=_still_built),
        Step("smoke", 120, child("smoke")),
        *(Step(name, 150, _tests) for name in TESTS),
        Step("tiles", 150, child("tiles"), least_s=40),
        *(Step(name, limit_s, child("measure"), least_s=40) for name, limit_s in MEASURED.items()),
        Step("decode", 120, child("decode"), least_s=40),
        Step("stream", 120, child("stream"), least_s=60),
        Step("cached", 120, child("cached"), least_s=60),
        Step("memcheck", 150, _sanitize),
        Step("synccheck", 150, _sanitize),
    ]


def _build(lease: Lease, limit_s: float, name: str) -> Outcome:
    return build.build(lease.sources, limit_s)


def _still_built(lease: Lease) -> bool:
    return build.is_built(lease.sources)


# Children.


def child(program: str) -> Callable[[Lease, float, str], Outcome]:
    """Returns a step that is a process of bench.gpu.lease.child. It writes results to the journal
    itself; its last line of output is the text of the outcome."""

    def run(lease: Lease, limit_s: float, name: str) -> Outcome:
        command = child_command(lease, program, name, limit_s)
        status, seconds, log = steps.run_logged(f"lease-{name}", command, limit_s)
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        text = lines[-1].strip()[:400]
        if status is None:
            text = f"stopped after {seconds:.0f} s; {text}"
        word = {0: "passed", 3: "unfinished", None: "unfinished"}.get(status, "failed")
        return {"status": word, "seconds": round(seconds, 1), "text": text}

    return run


def child_command(lease: Lease, program: str, name: str, limit_s: float) -> list[str]:
    command = [sys.executable, "-m", "bench.gpu.lease.child", program, name, "--out"]
    seconds = max(1.0, limit_s - (0 if lease.dry else _CHILD_RESERVE_S))
    command += [str(lease.out), "--seconds", f"{seconds:.1f}"]
    return [*command, *(["--dry"] if lease.dry else [])]


# Tests.


def test_files(name: str) -> list[str]:
    """Returns the test files of a group; "rest" has the files of no other group."""
    if name == "tests_torch":
        return ["tests/cuda_torch"]
    every = sorted(path.name for path in (ROOT / "tests" / "ops").glob("test_*.py"))

    def of(words: Sequence[str]) -> list[str]:
        found = []
        for word in words:
            found += [f for f in every if f.startswith(f"test_{word}") and f not in found]
        return found

    chosen = of(TESTS[name])
    if name == "tests_rest":
        taken = {file for words in TESTS.values() for file in of(words)}
        chosen = [file for file in every if file not in taken]
    return [f"tests/ops/{file}" for file in chosen]


def test_command(lease: Lease, name: str) -> tuple[list[str], list[str]]:
    """Returns the command, and the tests omitted because of missing packages."""
    has = {
        p: importlib.util.find_spec(p) is not None for p in ("expecttest", "xdist", "torch_cuda")
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--backend", "cuda"]
    command += ["--tb=short", "-rf", *test_files(name)]
    left_out = []
    selected = []
    if not has["expecttest"]:
        selected.append("not opcheck")
        left_out.append("tests of opcheck (expecttest is not installed)")
    if lease.dry:
        # One or two tests of each file.
        selected.append("(empty or misaligned or test_new_thread)")
        command += ["-p", "no:xdist"]
        if has["torch_cuda"]:
            command += ["-p", "tests.cuda_torch.simulated"]
        else:
            command[command.index("cuda")] = "cpu"
    elif has["xdist"]:
        command += ["-n", "8"]
    else:
        left_out.append("the other seven processes (pytest-xdist is not installed)")
    if selected:
        command += ["-k", " and ".join(selected)]
    return command, left_out


def _tests(lease: Lease, limit_s: float, name: str) -> Outcome:
    command, left_out = test_command(lease, name)
    environment = {"OMP_NUM_THREADS": "1"}
    status, seconds, log = steps.run_logged(f"lease-{name}", command, limit_s, environment)
    text = log.read_text(errors="replace")
    counts = steps.test_counts(text)
    failed = re.findall(r"^FAILED (\S+)", text, re.MULTILINE)
    said = ", ".join(f"{n} {what}" for what, n in counts.items()) or "no result"
    said += "".join(f"; without {what}" for what in left_out)
    # pytest's 5: nothing was selected, which is allowed only in a dry run.
    good = (status == 0 and counts.get("passed", 0) > 0) or (lease.dry and status in (0, 5))
    word = "passed" if good else "failed"
    if status is None:
        word, said = "unfinished", f"{said} when the time was up"
    more = {"counts": counts, "failed": failed[:_TOLD]} if failed else {"counts": counts}
    return {"status": word, "seconds": round(seconds, 1), "text": said, **more}


# Sanitizer.


def _sanitize(lease: Lease, limit_s: float, name: str) -> Outcome:
    """Runs memcheck or synccheck over a few calls of every op. A dry run makes only the calls."""
    if lease.dry:
        return child("small")(lease, limit_s, name)
    return steps.sanitize(name, limit_s)

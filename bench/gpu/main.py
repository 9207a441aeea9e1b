"""The command: ``python -m bench.gpu``. Imports no torch until the package is built."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu import steps
from bench.harness.files import RESULTS, dumps

if TYPE_CHECKING:
    from bench.gpu.run import Options

_WALK = "`python -m bench.gpu --device cpu --dry-run --quick` walks through it without one"
# Reserved for printing and writing.
_RESERVE_S = 10.0
# Maximum fraction of the remaining time for a step.
SHARES = {"build": 0.7, "tests": 0.25, "memcheck": 0.15, "racecheck": 0.15}
_QUICK_MODELS = ("mixtral-8x7b", "qwen3-30b", "deepseek-v3", "olmoe")
_QUICK_TOKENS = (1, 64, 4096)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Builds, tests and measures the CUDA kernels."
    )
    parser.add_argument("--minutes", type=float, help="for everything; 10, or 3 with --quick")
    parser.add_argument("--no-build", action="store_true", help="use the installed moe_ops")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--quick", action="store_true", help="four models, three numbers of tokens")
    parser.add_argument("--parts", nargs="+", help="forward, training, or ops")
    parser.add_argument("--models", nargs="+", help="names, see bench/gpu/cases.py")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--routings", nargs="+", choices=("balanced", "skewed", "random"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny layers, steps are only told; with --device cpu it needs no card",
    )
    parser.add_argument(
        "--json", type=Path, help="the result; bench/results/<card>.json if not given"
    )
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="print a result, measure nothing"
    )
    # Environment for passing control to the interpreter that was just set up.
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--built", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if everything passed, 1 if a step failed or there is no device."""
    options = parse(arguments)
    if options.render:
        from bench.gpu.report import print_result

        print_result(json.loads(options.render.read_text()))
        return 0
    if options.device == "cpu" and not options.dry_run:
        return _refuse("--device cpu is for walking through the benchmark only: add --dry-run.")
    minutes = options.minutes or (3.0 if options.quick else 10.0)
    started = options.started or time.time()
    end = started + 60 * minutes - (0.0 if options.dry_run else _RESERVE_S)
    outcomes: dict[str, Any] = json.loads(options.built) if options.built else {}

    if options.dry_run:
        for line in told_steps(options.no_build, options.no_tests):
            _log(started, f"would run: {line}")
    elif not options.no_build:
        if not gpu_device_files():
            return _refuse(f"bench.gpu needs an NVIDIA GPU, and this machine shows none; {_WALK}.")
        _log(started, "building into ./.venv with MOE_OPS_CUDA=on")
        outcomes["build"] = steps.build(SHARES["build"] * (end - time.time()))
        _log(started, outcomes["build"]["text"])
        if outcomes["build"]["status"] != "passed":
            return _refuse(f"bench.gpu: {outcomes['build']['text']}.")
        _hand_over(arguments, started, outcomes)

    if options.device == "cuda" and (refusal := _why_not_here()):
        return _refuse(refusal)
    if not options.no_tests:
        run = _walk_steps if options.dry_run else _run_steps
        outcomes |= run(started, end, options.device)
    result = _measure(options, started, end, outcomes)
    failed = [name for name, step in outcomes.items() if step["status"] == "failed"]
    return 1 if failed or "aborted" in result else 0


def told_steps(no_build: bool, no_tests: bool) -> list[str]:
    commands = [] if no_build else [steps.build_command()]
    if not no_tests:
        python = str(steps.VENV_PYTHON) if not no_build else sys.executable
        commands.append(steps.op_test_command(python))
        sanitizer = steps.find_sanitizer() or "compute-sanitizer"
        for tool in ("memcheck", "racecheck"):
            commands.append(steps.sanitizer_command(python, tool, sanitizer))
    return [" ".join(command) for command in commands]


def gpu_device_files() -> bool:
    """Returns whether the system has a GPU, checked before anything is built."""
    return any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))


def _why_not_here() -> str:
    try:
        import torch
    except ImportError:
        return (
            "bench.gpu --no-build needs the Python that moe_ops is installed in: it has no torch."
        )
    if not torch.cuda.is_available():
        return f"bench.gpu needs a CUDA device, and torch {torch.__version__} sees none; {_WALK}."
    try:
        from moe_ops import _library
    except ImportError as problem:
        return f"bench.gpu --no-build needs an installed moe_ops: {problem}."
    if dict(_library.build_info())["cuda"] == "off":
        return (
            "bench.gpu needs CUDA kernels, and the installed moe_ops is built without: leave "
            "--no-build out, or build with MOE_OPS_CUDA=on."
        )
    return ""


def _hand_over(arguments: Sequence[str] | None, started: float, outcomes: dict[str, Any]) -> None:
    """Continues in the environment just built; does not return."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    more = ["--no-build", "--started", str(started), "--built", json.dumps(outcomes)]
    os.chdir(steps.ROOT)
    python = str(steps.VENV_PYTHON)
    os.execv(python, [python, "-m", "bench.gpu", *given, *more])


def _run_steps(started: float, end: float, device: str) -> dict[str, Any]:
    outcomes = {}
    for name in ("tests", "memcheck", "racecheck"):
        limit_s = SHARES[name] * (end - time.time())
        _log(started, f"{name}, for {limit_s:.0f} s at most")
        run = steps.op_tests if name == "tests" else lambda s, tool=name: steps.sanitize(tool, s)
        outcomes[name] = run(limit_s)
        _log(started, f"{name}: {outcomes[name]['status']}, {outcomes[name]['text']}")
    return outcomes


def _walk_steps(started: float, end: float, device: str) -> dict[str, Any]:
    """Runs the sanitizer's calls without the sanitizer."""
    from bench.gpu import small

    begun = time.perf_counter()
    wrong = small.run(device)
    text = "; ".join(wrong) or "every op agrees with its reference"
    _log(started, f"bench.gpu.small on {device}: {text}")
    seconds = round(time.perf_counter() - begun, 1)
    return {"small": {"status": "failed" if wrong else "passed", "seconds": seconds, "text": text}}


def chosen(options: argparse.Namespace, seconds: float) -> Options:
    """Returns the options of the run. Raises ValueError for a name that does not exist."""
    from bench.gpu import cases
    from bench.gpu.run import Options

    tiny = options.dry_run
    known = cases.TINY if tiny else cases.MODELS
    models = options.models or (_QUICK_MODELS if options.quick and not tiny else tuple(known))
    for kind, names, allowed in (
        ("--models", models, known),
        ("--parts", options.parts or (), (*cases.PARTS, *cases.LEASE_PARTS)),
    ):
        for name in names:
            if name not in allowed:
                raise ValueError(f"{kind} must be of {', '.join(allowed)}, got {name}.")
    tokens = options.tokens or ((1, 16) if tiny else _QUICK_TOKENS if options.quick else None)
    return Options(
        seconds=seconds,
        parts=tuple(options.parts or cases.PARTS),
        shapes=tuple(known[name] for name in models),
        tokens=None if tokens is None else tuple(tokens),
        routings=tuple(options.routings or cases.USUAL_ROUTINGS),
        tiny=tiny,
    )


def _measure(
    options: argparse.Namespace, started: float, end: float, outcomes: dict[str, Any]
) -> dict[str, Any]:
    from bench.gpu.card import slug
    from bench.gpu.report import print_result
    from bench.gpu.run import measure
    from moe_ops._files import write_text

    def write(result: dict[str, Any]) -> None:
        path = options.json
        if path is None and not options.dry_run:
            path = RESULTS / f"{slug(result['card']['name'])}.json"
        if path is not None:
            write_text(path, dumps({**result, "steps": outcomes}))

    # Limits are measured again at the end, in a second or two.
    seconds = max(1.0, end - time.time() - (0 if options.dry_run else 5))
    result = measure(
        chosen(options, seconds),
        device=options.device,
        log=lambda line: _log(started, line),
        save=write,
    )
    result["steps"] = outcomes
    write(result)
    print_result(result)
    return result


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def _log(started: float, line: str) -> None:
    print(f"[{time.time() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

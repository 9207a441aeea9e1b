"""Benchmarks of moe_ops on this CPU against the libraries of `bench.peers`: ``python -m
bench.cpu``.

    python -m bench.cpu --all --json bench/results/NAME.json

Run it at the root of the source tree. `bench/peers` has one file per library.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cpu.report import render
from bench.cpu.run import MODES, Plan, join, run
from bench.harness.arguments import seconds, whole
from bench.harness.files import dumps
from bench.peers import PEERS
from moe_ops._arguments import MAX_THREADS, MAX_TOKENS
from moe_ops._files import describe, read_json, write_text
from moe_ops.bench import machine, measure
from moe_ops.bench.baselines import Baseline
from moe_ops.bench.shapes import SHAPES

QUICK = Plan(**{**measure.QUICK.__dict__, "part_tokens": (1, 512), "thp": False})
QUICK = replace(QUICK, modes=("forward", "training", "parts"))
FULL = Plan(
    modes=("forward", "quantized", "training", "parts", "memory"), shapes=measure.Plan.shapes
)
# The runs in bench/results.
ALL = Plan()
# Fields of a plan that are shape names, and those that are numbers of tokens.
_SHAPES = ("shapes", "quantized_shapes", "training_shapes", "memory_shapes")
_TOKENS = ("tokens", "training_tokens", "part_tokens")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.cpu", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="small layers, about a minute")
    which.add_argument("--all", action="store_true", help="everything, some 20 minutes")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="for all modes")
    parser.add_argument(
        "--tokens", nargs="+", type=whole(1, MAX_TOKENS), help="numbers of tokens, for all modes"
    )
    parser.add_argument("--weights", nargs="+", choices=("fp32", "bf16"))
    parser.add_argument(
        "--threads", type=whole(1, MAX_THREADS), help="of every baseline; 1 if not given"
    )
    parser.add_argument("--isa", choices=machine.ISA_ENVIRONMENTS, help="hold everything to it")
    parser.add_argument("--baselines", nargs="+", help="ours and these only, by name")
    parser.add_argument("--budget", type=seconds, help="seconds a cell")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result; -: print only it")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument(
        "--render", nargs="+", type=Path, metavar="JSON", help="measure nothing: report these files"
    )
    parser.add_argument(
        "--join", nargs="+", type=Path, metavar="JSON", help="measure nothing: make one of these"
    )
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    changes: dict[str, Any] = {}
    for fields, values in ((_SHAPES, options.shapes), (_TOKENS, options.tokens)):
        if values:
            changes |= dict.fromkeys(fields, tuple(values))
    if options.modes:
        changes["modes"] = tuple(options.modes)
    if options.weights:
        changes["formats"] = tuple(options.weights)
    if options.threads:
        changes["threads"] = options.threads
    if options.budget:
        changes["budget_s"] = options.budget
    return replace(QUICK if options.quick else ALL if options.all else FULL, **changes)


def main(arguments: Sequence[str] | None = None, *, baselines: Sequence[Baseline] = PEERS) -> None:
    """Measures with the built-in baselines and these, prints the report, writes files.

    A file that cannot be read or written ends the process with one sentence and status 1, Ctrl-C
    with status 130.
    """
    options = parse(arguments)
    try:
        _main(options, baselines)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.exit(f"bench.cpu: {describe(error)}")
    except ValueError as error:
        sys.exit(f"bench.cpu: {error}")
    except KeyboardInterrupt:
        print("bench.cpu: stopped", file=sys.stderr)
        sys.exit(130)


def _main(options: argparse.Namespace, baselines: Sequence[Baseline]) -> None:
    if options.render:
        with _of_this_benchmark(options.render):
            texts = [render(read_json(path)) for path in options.render]
        _write(options.markdown, "\n".join(texts))
        return
    if options.join:
        with _of_this_benchmark(options.join):
            result = join([read_json(path) for path in options.join])
    else:
        machine.hold_to_isa(options.isa)
        started = time.perf_counter()

        def log(line: str) -> None:
            print(f"[{time.perf_counter() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

        result = run(plan_of(options), baselines=baselines, only=options.baselines, log=log)
    if str(options.json) == "-":
        print(dumps(result), end="")
        return
    if options.json:
        write_text(options.json, dumps(result))
    _write(options.markdown, render(result))


def _write(path: Path | None, text: str) -> None:
    if path is None:
        print(text)
    else:
        write_text(path, text)


@contextlib.contextmanager
def _of_this_benchmark(paths: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{', '.join(map(str, paths))} must be results of this benchmark, got something else "
            f"({type(error).__name__}: {error})"
        ) from error

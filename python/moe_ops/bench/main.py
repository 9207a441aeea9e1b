"""The command line of the benchmark: ``python -m moe_ops.bench``, ``moe-ops bench``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_ops._arguments import MAX_THREADS, MAX_TOKENS, seconds, whole
from moe_ops._files import describe, read_json, write_text
from moe_ops.bench import machine, report
from moe_ops.bench.contenders import Contender
from moe_ops.bench.run import join, run
from moe_ops.bench.session import MODES, Plan
from moe_ops.bench.shapes import SHAPES

# About a minute: a small and a medium layer.
QUICK = Plan(
    modes=("forward", "training", "parts"),
    shapes=("d", "e"),
    tokens=(1, 16, 256),
    training_shapes=("e",),
    training_tokens=(16, 256),
    part_tokens=(1, 512),
    thp=False,
    budget_s=0.8,
    limit_s=0.3,
)
# What a user with patience sees: about ten minutes.
FULL = Plan(modes=("forward", "quantized", "training", "parts", "memory"), shapes=("a32", "d"))
# The run behind docs/performance.md.
ALL = Plan()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="moe_ops.bench", description=__doc__)
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
        "--threads", type=whole(1, MAX_THREADS), help="of every contender; 1 if not given"
    )
    parser.add_argument("--isa", choices=machine.ISA_ENVIRONMENTS, help="hold everything to it")
    parser.add_argument("--contenders", nargs="+", help="ours and these only, by name")
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


def plan_of(arguments: argparse.Namespace) -> Plan:
    plan = QUICK if arguments.quick else ALL if arguments.all else FULL
    changes: dict[str, Any] = {}
    if arguments.modes:
        changes["modes"] = tuple(arguments.modes)
    if arguments.shapes:
        for key in ("shapes", "quantized_shapes", "training_shapes", "memory_shapes"):
            changes[key] = tuple(arguments.shapes)
    if arguments.tokens:
        for key in ("tokens", "training_tokens", "part_tokens"):
            changes[key] = tuple(arguments.tokens)
    if arguments.weights:
        changes["formats"] = tuple(arguments.weights)
    if arguments.contenders:
        changes["only"] = tuple(arguments.contenders)
    if arguments.threads:
        changes["threads"] = arguments.threads
    if arguments.budget:
        changes["budget_s"] = arguments.budget
    return replace(plan, **changes)


def main(arguments: Sequence[str] | None = None, *, contenders: Sequence[Contender] = ()) -> None:
    """Measures with the built-in contenders and these, prints the report, writes files.

    A file that cannot be read or written ends the process with one sentence and status 1, Ctrl-C
    with status 130.
    """
    try:
        _main(parse(arguments), contenders)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.exit(f"moe_ops.bench: {describe(error)}")
    except ValueError as error:
        sys.exit(f"moe_ops.bench: {error}")
    except KeyboardInterrupt:
        print("moe_ops.bench: stopped", file=sys.stderr)
        sys.exit(130)


def _main(options: argparse.Namespace, contenders: Sequence[Contender]) -> None:
    if options.render:
        with _of_this_benchmark(options.render):
            texts = [report.render(read_json(path)) for path in options.render]
        _write(options.markdown, "\n".join(texts))
        return
    if options.join:
        with _of_this_benchmark(options.join):
            joined = join([read_json(path) for path in options.join])
        _finish(options, joined)
        return
    if options.isa and not machine.held_to_isa(options.isa):
        machine.restart_with_isa(options.isa)
    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

    result = run(plan_of(options), contenders=contenders, log=log)
    _finish(options, result)


@contextlib.contextmanager
def _of_this_benchmark(paths: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{', '.join(map(str, paths))} must be results of this benchmark, got something else "
            f"({type(error).__name__}: {error})"
        ) from error


def _finish(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if str(options.json) == "-":
        print(dumps(result), end="")
        return
    if options.json:
        write_text(options.json, dumps(result))
    _write(options.markdown, report.render(result))


def dumps(result: dict[str, Any]) -> str:
    """JSON with one cell a line, so that two runs can be compared line by line."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list) and value:
            cells = ",\n  ".join(json.dumps(cell, separators=(",", ":")) for cell in value)
            lines.append(f'"{key}": [\n  {cells}\n]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write(path: Path | None, text: str) -> None:
    if path is None:
        print(text)
    else:
        write_text(path, text)

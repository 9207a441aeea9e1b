"""The command line of the benchmark: ``python -m moe_ops.bench``, ``moe-ops bench``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_ops._arguments import MAX_THREADS, MAX_TOKENS, seconds, whole
from moe_ops._files import describe, write_text
from moe_ops.bench import machine, report
from moe_ops.bench.measure import Plan, run
from moe_ops.bench.shapes import SHAPES

# About a minute: a small and a medium layer.
QUICK = Plan(
    modes=("forward", "training"),
    shapes=("d", "e"),
    tokens=(1, 16, 256),
    training_shapes=("e",),
    training_tokens=(16, 256),
    budget_s=0.8,
    limit_s=0.3,
)
# About ten minutes.
FULL = Plan()
# Fields of a plan that are names of shapes, and those that are numbers of tokens.
_SHAPES = ("shapes", "quantized_shapes", "training_shapes", "memory_shapes")
_TOKENS = ("tokens", "training_tokens", "part_tokens")


def make_parser(prog: str, description: str | None, modes: Sequence[str]) -> Any:
    """The options that choose what is measured and where the result goes."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--quick", action="store_true", help="small layers, about a minute")
    parser.add_argument("--modes", nargs="+", choices=modes)
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
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parsed: argparse.Namespace = make_parser("moe_ops.bench", __doc__, FULL.modes).parse_args(
        arguments
    )
    return parsed


def plan_of(arguments: argparse.Namespace, plan: Any) -> Any:
    """`plan` with what the arguments change."""
    changes: dict[str, Any] = {}
    for fields, values in ((_SHAPES, arguments.shapes), (_TOKENS, arguments.tokens)):
        if values:
            changes |= {field: tuple(values) for field in fields if hasattr(plan, field)}
    if arguments.modes:
        changes["modes"] = tuple(arguments.modes)
    if arguments.weights:
        changes["formats"] = tuple(arguments.weights)
    if arguments.baselines:
        changes["only"] = tuple(arguments.baselines)
    if arguments.threads:
        changes["threads"] = arguments.threads
    if arguments.budget:
        changes["budget_s"] = arguments.budget
    return replace(plan, **changes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the report, writes files; errors as `in_one_sentence` says."""
    options = parse(arguments)
    with in_one_sentence("moe_ops.bench"):
        hold_to_isa(options)
        finish(options, run(plan_of(options, QUICK if options.quick else FULL), log=progress()))


@contextlib.contextmanager
def in_one_sentence(name: str) -> Iterator[None]:
    """A file that cannot be read or written ends the process with one sentence and status 1,
    Ctrl-C with status 130."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.exit(f"{name}: {describe(error)}")
    except ValueError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)


def progress() -> Callable[[str], None]:
    """Prints lines to stderr with the seconds since now."""
    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

    return log


def hold_to_isa(options: argparse.Namespace) -> None:
    """Starts the command again where ``--isa`` asks for an environment that is not there."""
    if options.isa and not machine.held_to_isa(options.isa):
        machine.restart_with_isa(options.isa)


def finish(
    options: argparse.Namespace,
    result: dict[str, Any],
    render: Callable[[dict[str, Any]], str] = report.render,
) -> None:
    """Writes the result and its report where the options say."""
    if str(options.json) == "-":
        print(report.dumps(result), end="")
        return
    if options.json:
        write_text(options.json, report.dumps(result))
    write_report(options, render(result))


def write_report(options: argparse.Namespace, text: str) -> None:
    if options.markdown is None:
        print(text)
    else:
        write_text(options.markdown, text)

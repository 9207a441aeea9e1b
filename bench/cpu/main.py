"""Measures moe_ops on this CPU beside the libraries of `bench.peers`: ``python -m bench.cpu``.

    python -m bench.cpu --all --json bench/results/NAME.json

Run it at the root of the source tree. `bench/peers` has a file a library.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.cpu.report import render
from bench.cpu.run import MODES, Plan, join, run
from bench.peers import PEERS
from moe_ops._files import read_json
from moe_ops.bench import main as users
from moe_ops.bench.baselines import Baseline

QUICK = Plan(**{**users.QUICK.__dict__, "part_tokens": (1, 512), "thp": False})
QUICK = replace(QUICK, modes=("forward", "training", "parts"))
FULL = Plan(modes=(*users.FULL.modes, "parts", "memory"), shapes=users.FULL.shapes)
# The runs in bench/results.
ALL = Plan()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser: argparse.ArgumentParser = users.make_parser("bench.cpu", __doc__, MODES)
    parser.add_argument("--all", action="store_true", help="everything, some 20 minutes")
    parser.add_argument(
        "--render", nargs="+", type=Path, metavar="JSON", help="measure nothing: report these files"
    )
    parser.add_argument(
        "--join", nargs="+", type=Path, metavar="JSON", help="measure nothing: make one of these"
    )
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    plan: Plan = users.plan_of(options, QUICK if options.quick else ALL if options.all else FULL)
    return plan


def main(arguments: Sequence[str] | None = None, *, baselines: Sequence[Baseline] = PEERS) -> None:
    """Measures, prints the report, writes files; errors as `moe_ops.bench.main.in_one_sentence`."""
    options = parse(arguments)
    with users.in_one_sentence("bench.cpu"):
        if options.render:
            with _of_this_benchmark(options.render):
                texts = [render(read_json(path)) for path in options.render]
            users.write_report(options, "\n".join(texts))
            return
        if options.join:
            with _of_this_benchmark(options.join):
                result = join([read_json(path) for path in options.join])
        else:
            users.hold_to_isa(options)
            result = run(plan_of(options), baselines=baselines, log=users.progress())
        users.finish(options, result, render)


@contextlib.contextmanager
def _of_this_benchmark(paths: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{', '.join(map(str, paths))} must be results of this benchmark, got something else "
            f"({type(error).__name__}: {error})"
        ) from error

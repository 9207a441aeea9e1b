"""The command ``python -m bench.studies efficiency``.

It counts and measures the claims that have no stored result, one after the other, and writes the
page; a killed run goes on with the next claim.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.arguments import seconds
from bench.harness.files import commit, rounded
from bench.harness.machine import describe_machine, load, now
from moe_ops._files import write_text

from . import report
from .claims import CLAIMS, Claim
from .count import count
from .measure import measure_peak, measure_time

RESULT = Path(__file__).with_name("result.json")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies efficiency", description=__doc__.splitlines()[0]
    )
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--again", action="store_true", help="also those with a stored result")
    parser.add_argument("--page", action="store_true", help="write the page and measure nothing")
    parser.add_argument("--seconds", type=seconds, default=3.0, help="for a scene (3)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.claims) - set(CLAIMS))
    if unknown:
        raise ValueError(f"efficiency: claims must be among {', '.join(CLAIMS)}, got {unknown}.")
    if not options.page:
        for name in options.claims or CLAIMS:
            if options.again or not read()["claims"].get(name, {}).get("measured"):
                store(name, measure(CLAIMS[name], options.seconds))
                print(f"measured {name}", flush=True)
    for path in report.write(read()):
        print(f"wrote {path}")
    return 0


def measure(claim: Claim, budget_s: float) -> dict[str, Any]:
    """Returns everything about a claim that is counted and measured."""
    torch.manual_seed(0)
    return {
        "when": now(),
        "commit": commit(),
        "load": load(),
        "threads": torch.get_num_threads(),
        "counted": count(claim),
        "measured": rounded(measure_time(claim, budget_s)),
        "peak": measure_peak(claim),
    }


def read(path: Path = RESULT) -> dict[str, Any]:
    """Returns the stored results: the machine, and the claims by name."""
    if not path.is_file():
        return {"machine": describe_machine(), "claims": {}}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def store(name: str, result: dict[str, Any], path: Path = RESULT) -> None:
    """Writes the result of a claim; results of another machine are dropped."""
    found = read(path)
    machine = describe_machine()
    if found["machine"]["cpu"] != machine["cpu"]:
        found["claims"] = {}
    claims = {**found["claims"], name: result}
    ordered = {key: claims[key] for key in CLAIMS if key in claims}
    text = json.dumps({"machine": machine, "claims": ordered}, indent=1)
    write_text(path, text + "\n")

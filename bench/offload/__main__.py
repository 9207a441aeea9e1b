"""Decoding with experts on disk, policy by policy: ``python -m bench.offload``."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness.arguments import whole
from bench.harness.files import ROOT, commit, dumps, rounded
from bench.harness.machine import describe_machine, load, now

from .run import Plan, measure

PAGE = ROOT / "docs" / "zoo" / "expertflow.md"
RESULT = ROOT / "bench" / "offload" / "result.json"
QUICK = Plan(
    train_steps=2,
    predictor_steps=2,
    trace_batches=1,
    hidden_size=32,
    num_layers=2,
    num_experts=8,
    intermediate_size=48,
    prompt=4,
    tokens=4,
    batches=(2,),
    caches=(0.25,),
    rounds=1,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.offload", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a size whose times mean nothing")
    parser.add_argument("--rounds", type=whole(1, 100), help="of each cell")
    parser.add_argument("--tokens", type=whole(1, 10**5), help="of each stream")
    parser.add_argument("--stores", nargs="+", choices=Plan.stores, help="of the file of experts")
    parser.add_argument("--streams", nargs="+", type=whole(1, 1000), help="decoded side by side")
    parser.add_argument(
        "--join", action="store_true", help="keep recorded cells of other stores and streams"
    )
    parser.add_argument("--model", type=Path, help="a checkpoint of zoo.deepseek, read as bytes")
    parser.add_argument("--folder", type=Path, help="for the file of experts; else a temporary one")
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name} and the page")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    for name in ("rounds", "tokens", "model", "stores"):
        if getattr(options, name) is not None:
            setattr(plan, name, getattr(options, name))
    plan.batches = tuple(options.streams or plan.batches)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        before = load()
        found = measure(plan, Path(folder))
    plan_said = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(plan).items()}
    result = {
        "machine": describe_machine(),
        "when": now(),
        "commit": commit(),
        "load": [*before, *load()],
        "plan": plan_said,
        **rounded(found),
    }
    if options.join:
        result = joined(json.loads(RESULT.read_text()), result)
    text = page(result)
    print(text)
    if options.record:
        RESULT.write_text(dumps(result))
        pattern = re.compile(r"(<!-- offload -->\n).*?(<!-- /offload -->)", re.DOTALL)
        PAGE.write_text(pattern.sub(lambda m: m[1] + text + m[2], PAGE.read_text()))


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the new result with the cells of the old one that were not measured again."""
    keys = ("streams", "store", "cache")
    measured = {tuple(cell[key] for key in keys) for cell in new["cells"]}
    kept = [cell for cell in old["cells"] if tuple(cell[k] for k in keys) not in measured]
    return {
        **new,
        "page_in_ms": {**old["page_in_ms"], **new["page_in_ms"]},
        "cells": kept + new["cells"],
    }


def page(result: dict[str, Any]) -> str:
    """Returns the text between the page's marks."""
    plan, recall = result["plan"], result["recall"]
    megabytes = result["expert_bytes"] / 2**20
    lines = [
        f"{result['machine']['cpu']}, one thread for the model and one that fetches; "
        f"{result['when']}. {result['num_experts']} experts of {megabytes:.2f} MiB, top-"
        f"{plan['top_k']}, {plan['num_layers']} layers; {plan['tokens']} tokens a stream. Of the "
        f"experts a token uses, a table of tokens names {recall['table of tokens']:.0%} and the "
        f"predictor ({result['predictor_bytes'] / 2**20:.1f} MiB) {recall['predictor']:.0%} first. "
        "Reading one expert takes "
        + " and ".join(f"{ms:.2f} ms ({kind})" for kind, ms in result["page_in_ms"].items())
        + ".",
        "",
        "| streams | file | cache | policy | tokens a second | there | on their way | loads a step "
        "| wait a step, ms | of LRU's wait hidden | without a core, ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        lines.append(
            f"| {cell['streams']} | {cell['store']} | {cell['cache']:.0%} | {cell['policy']} | "
            f"{cell['tokens_a_second']:.0f} of {cell['in_memory']:.0f} | {cell['hit_rate']:.0%} | "
            f"{cell['late']:.0%} | {cell['loads']:.1f} | {cell['wait_ms']:.2f} | "
            f"{cell['hidden']:.0%} | {cell['delay_ms']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

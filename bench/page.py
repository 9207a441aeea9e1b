"""Writes docs/performance.md from the JSON files in bench/baselines: ``python -m bench.page``."""

from __future__ import annotations

import json
from pathlib import Path

from moe_ops.bench.report import render

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BASELINES = ROOT / "bench" / "baselines"
_HEAD = """\
# Performance

<!-- Made by `python -m bench.page` from bench/baselines; do not edit. -->

What `python -m bench.run --all` measured, one section a file of `bench/baselines`. Contenders run
in one process, in turns, on one thread; times are medians without the samples in which a thread
waited for a core. Every contender's output is compared with fp64 first. The goals are what this
project has set itself; where one is not met, the table says so.
"""


def page() -> str:
    results = [json.loads(path.read_text()) for path in sorted(BASELINES.glob("*.json"))]
    return "\n".join([_HEAD, *map(render, results)])


if __name__ == "__main__":
    PAGE.write_text(page())

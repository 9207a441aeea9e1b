"""Writes the performance pages from the JSON files in bench/baselines: ``python -m bench.page``.

docs/performance.md has the CPUs, docs/performance-cuda.md the cards, if there is a baseline of one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.gpu import report as gpu_report
from moe_ops._files import write_text
from moe_ops.bench.report import render

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
CUDA_PAGE = ROOT / "docs" / "performance-cuda.md"
BASELINES = ROOT / "bench" / "baselines"
_HEAD = """\
# Performance

<!-- Made by `python -m bench.page` from bench/baselines; do not edit. -->

What `python -m bench.run --all` measured, one section a file of `bench/baselines`. Contenders run
in one process, in turns, on one thread; times are medians without the samples in which a thread
waited for a core. From commit 60a6e53 on, a job of less than 20 ms runs once untimed before its
sample, so that it finds its own data in the caches. Every contender's output is compared with fp64
first. The goals are what this project has set itself; where one is not met, the table says so. *At
the limit*: what the worst cell's ratio would be if ours ran at the limit of the machine; *out of
reach*: not even that would meet the goal in any cell that misses it, because the other library is
too close to the limit.
"""


_CUDA_HEAD = f"""\
# Performance on CUDA

<!-- Made by `python -m bench.page` from bench/baselines; do not edit. -->

What `python -m bench.gpu` measured, one section a card.

{gpu_report.HOW}
"""


def page() -> str:
    return "\n".join([_HEAD, *(render(r) for r in _results() if r.get("kind") != "gpu")])


def cuda_page() -> str:
    """Empty without a baseline of a card."""
    cards = [gpu_report.markdown(r) for r in _results() if r.get("kind") == "gpu"]
    return "\n".join([_CUDA_HEAD, *cards]) if cards else ""


def _results() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(BASELINES.glob("*.json"))]


if __name__ == "__main__":
    write_text(PAGE, page())
    if text := cuda_page():
        write_text(CUDA_PAGE, text)

"""Writes the tables of each recorded result: ``python -m bench.harness.dump``.

bench/results/NAME.md is generated from bench/results/NAME.json and never edited.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.cpu import report as cpu_report
from bench.gpu import report as gpu_report
from bench.harness.files import RESULTS
from moe_ops._files import write_text

_MADE = "<!-- Made by `python -m bench.harness.dump`; do not edit. -->\n\n"


def dump(path: Path) -> str:
    """Returns the tables of the result in a JSON file."""
    result = json.loads(path.read_text())
    if result.get("kind") == "gpu":
        return f"{_MADE}{gpu_report.HOW}\n\n{gpu_report.markdown(result)}"
    return _MADE + cpu_report.render(result)


if __name__ == "__main__":
    for source in sorted(RESULTS.glob("*.json")):
        write_text(source.with_suffix(".md"), dump(source))

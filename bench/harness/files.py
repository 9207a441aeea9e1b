"""Locations of the source tree and its recorded results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def commit() -> str:
    """Returns git's name of the tree, with "-dirty" if files have changed; "" without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def dumps(result: dict[str, Any]) -> str:
    """Returns JSON with one cell per line, so that two runs can be compared line by line."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list) and value:
            cells = ",\n  ".join(json.dumps(cell, separators=(",", ":")) for cell in value)
            lines.append(f'"{key}": [\n  {cells}\n]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rounded(value: Any) -> Any:
    """Rounds floats to four significant digits, recursively."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value

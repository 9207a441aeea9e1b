"""A fresh interpreter that imports the same moe_ops as this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import moe_ops


def run_python(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` with one thread; `timeout` in seconds."""
    root = str(Path(moe_ops.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )

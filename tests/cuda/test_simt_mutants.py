"""The kernels of routing, permutation and column sums, broken one place at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_mutants_are_noticed(simulator):
    """Barriers, ranks, ties, terms, bounds and stores of the compiled kernels (simt_mutants.py)."""
    script = Path(__file__).with_name("simt_mutants.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    noticed = json.loads(done.stdout)
    assert len(noticed) >= 10
    assert [name for name, how in noticed.items() if how is None] == []

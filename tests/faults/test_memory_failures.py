"""Every allocation of a call fails in turn: one exception that says memory, the next call right,
nothing leaked. What is run is tests/faults/failures.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..contract.every_op import OPS

TESTS = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another library is preloaded"),
]


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.full)])
def test_every_allocation_fails_once(tmp_path, full):
    library = tmp_path / "failing.so"
    source = TESTS / "faults" / "failing.cpp"
    build = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(build, check=True)
    command = [sys.executable, "-m", f"{TESTS.name}.faults.failures", *["--full"][: int(full)]]
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    faults = [
        f"{call['call']} {call['dtype']}, {call['threads']} threads: {fault}"
        for call in calls
        for fault in call["faults"]
    ]
    assert done.returncode == 0, f"{done.stderr}\nafter {calls[-1] if calls else 'nothing'}"
    assert not faults, "\n".join(faults)
    assert {call["call"] for call in calls} >= set(OPS)
    assert all(call["allocations"] > 0 for call in calls)

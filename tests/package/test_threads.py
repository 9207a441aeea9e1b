"""Tests of how threads wait: commands of the package let them sleep, a library import changes
nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ops import _threads, doctor

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Runs before everything else in a process, and says at its end what OpenMP had been told.
SITE = """
import atexit, os
atexit.register(
    lambda: print("policy:", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
)
"""


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (["python", "/usr/bin/moe-ops", "demo"], True),
        (["python3.12", "-I", "C:/Scripts/moe-ops.exe", "doctor"], True),
        (["python", "-m", "moe_ops.demo", "--smoke"], True),
        (["python", "-X", "dev", "-m", "moe_ops"], True),
        (["python", "train.py", "-m", "moe_ops"], False),
        (["python", "-m", "torch.distributed.run", "-m", "moe_ops.demo"], False),
        (["python", "-m", "pytest", "moe-ops"], False),
        (["python", "-c", "import moe_ops"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_commands_of_the_package(line: list[str], command: bool):
    assert _threads.runs_a_command(line) == command


@pytest.mark.parametrize(
    ("line", "given", "policy"),
    [
        (["-m", "moe_ops.cli", "--help"], None, "passive 1000"),
        (["-m", "moe_ops.cli", "--help"], "active", "active None"),
        (["-c", "import moe_ops"], None, "None None"),
    ],
    ids=["command", "command with a choice", "library"],
)
def test_policy_of_a_process(line: list[str], given: str | None, policy: str, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    paths = [str(tmp_path), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    run = subprocess.run(
        [sys.executable, *line], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == f"policy: {policy}"


@pytest.mark.parametrize(
    ("policy", "here", "level", "words"),
    [
        ("passive", False, "ok", "sleep"),
        ("passive", True, "info", "moe-ops sets that for its own commands"),
        ("active", False, "info", "spin"),
        (None, False, "info", "spin"),
    ],
)
def test_doctor_says_how_threads_wait(policy, here, level, words, monkeypatch):
    monkeypatch.setattr(_threads, "set_here", here)
    if policy is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    finding = doctor._wait_policy()
    assert finding.level == level and words in finding.text

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moe_ops
from moe_ops.cli import MISSING_EXTRA, bench
from moe_ops.cli.app import app

runner = CliRunner()


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that imports the same moe_ops as this one."""
    root = str(Path(moe_ops.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("doctor", "demo", "bench"):
        assert command in result.output


def test_version():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == moe_ops.__version__


def test_import_is_light():
    heavy = ["typer", "rich", "matplotlib", "transformers", "safetensors", "moe_ops.cli"]
    code = f"import sys, moe_ops; print([m for m in {heavy} if m in sys.modules])"
    result = run_python("-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_one_sentence_without_the_cli_extra(package):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from moe_ops.cli import main\n"
        "main(['doctor'])"
    )
    result = run_python("-c", code)
    assert result.returncode == 1
    assert result.stderr.strip() == MISSING_EXTRA
    assert result.stdout == ""


def test_demo_says_that_it_needs_safetensors():
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "from moe_ops.cli import main\n"
        "main(['demo', '--smoke'])"
    )
    result = run_python("-c", code)
    assert result.returncode == 1
    assert "pip install safetensors" in result.stdout
    assert "Traceback" not in result.stderr


def test_contenders_compute_the_same():
    case = bench.Case("test", T=37, H=16, I=24, E=5, K=2)
    inputs = bench.make_inputs(case)
    outputs = {name: block(*inputs) for name, block in bench.CONTENDERS.items()}
    for name, y in outputs.items():
        torch.testing.assert_close(y, outputs["loop"], rtol=1e-5, atol=1e-5, msg=name)


def test_bench_json(monkeypatch):
    cases = [
        bench.Case("tiny", T=16, H=32, I=32, E=4, K=2),
        bench.Case("tiny", T=16, H=32, I=32, E=4, K=2, dtype=torch.bfloat16),
    ]
    monkeypatch.setattr(bench, "QUICK", cases)
    monkeypatch.setattr(bench, "_MAX_ROUNDS", 3)
    result = runner.invoke(app, ["bench", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["cases"]) == 2
    for case in report["cases"]:
        for key in ("forward", "forward_backward"):
            assert set(case[key]["seconds"]) == {"loop", "grouped_mm", "moe_ops"}
            assert all(value > 0 for value in case[key]["seconds"].values())
            assert set(case[key]["speedup"]) == {"loop", "grouped_mm"}
        limit = 0.02 if "bfloat16" in case["shape"] else 1e-5
        assert all(value <= limit for value in case["max_difference"].values())


def test_bench_table(monkeypatch):
    monkeypatch.setattr(bench, "QUICK", [bench.Case("tiny", T=16, H=32, I=32, E=4, K=2)])
    monkeypatch.setattr(bench, "_MAX_ROUNDS", 3)
    result = runner.invoke(app, ["bench", "--quick"], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    assert "grouped_mm" in result.output and "tiny" in result.output

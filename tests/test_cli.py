from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moe_ops
from moe_ops.cli import MISSING_EXTRA
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
    for command in ("doctor", "demo", "bench", "quantize", "zoo", "claims"):
        assert command in result.output


def test_version():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == moe_ops.__version__


def test_import_is_light():
    heavy = [
        "typer",
        "rich",
        "matplotlib",
        "transformers",
        "safetensors",
        "moe_ops.cli",
        "moe_ops.zoo",
    ]
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


def test_bench_names_the_instruction_sets_that_it_takes():
    result = runner.invoke(app, ["bench", "--isa", "sse"])
    assert result.exit_code == 1
    assert result.output.strip() == "error: bench: --isa must be avx2, got sse."


def test_demo_says_that_it_needs_safetensors():
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "from moe_ops.cli import main\n"
        "main(['demo', '--smoke'])"
    )
    result = run_python("-c", code)
    assert result.returncode == 1
    assert "pip install safetensors" in result.stderr
    assert "Traceback" not in result.stderr

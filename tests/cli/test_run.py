"""moe-ops run: programs that import nothing of moe_ops open its checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from tests.helpers.fresh_python import run_python
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops

PROGRAM = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
print(sys.argv[3:], "moe_ops" in sys.modules)
sys.exit(3)
"""

# Processes in other folders find the package where this one does.
PATH = str(Path(moe_ops.__file__).parents[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A quantized checkpoint, and the logits of its model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=1,
    )
    model = moe_ops.quantize(Qwen3MoeForCausalLM(config).eval(), moe_ops.Int8WeightConfig())
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(torch.arange(8)[None]).logits


def run(*words, cwd):
    return run_python("-m", "moe_ops", "run", *map(str, words), cwd=cwd)


def python(*words, cwd, program=sys.executable, **environment):
    return subprocess.run(
        [str(program), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PATH, **environment},
    )


@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_program_opens_a_quantized_checkpoint(checkpoint, tmp_path, kind):
    folder, logits = checkpoint
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["program.py"] if kind == "file" else ["-m", "program"]
    done = run("--", *words, folder, "out.pt", "--model", "hf", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stdout.endswith("['--model', 'hf'] True\n")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits)


def test_commands_of_the_environment_get_their_options(tmp_path):
    done = run("transformers", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "serve" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-command"], "PROGRAM must be a command of this Python environment, a file of"),
        (["--", "-m", "no.such.module"], "MODULE must be installed, got no.such.module"),
        (["--", "-m"], "PROGRAM must be a command, a file of Python or -m MODULE, got nothing"),
    ],
)
def test_what_is_no_program(tmp_path, words, message):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: run: ") and message in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_of_a_program_are_its_own(tmp_path):
    (tmp_path / "broken.py").write_text("raise ValueError('its own')\n")
    done = run("broken.py", cwd=tmp_path)
    assert done.returncode == 1 and "broken.py" in done.stderr and "its own" in done.stderr


SPAWNING = """
import multiprocessing, sys
import torch
from transformers import AutoModelForCausalLM

def child(folder, out):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(8)[None]).logits
    torch.save(logits, out)

def main():
    process = multiprocessing.get_context("spawn").Process(target=child, args=sys.argv[1:])
    process.start()
    process.join()
    return process.exitcode
"""


def test_processes_that_a_command_spawns(checkpoint, tmp_path):
    folder, logits = checkpoint
    (tmp_path / "spawning.py").write_text(SPAWNING)
    package = tmp_path / "spawning-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: spawning\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[console_scripts]\nspawning = spawning:main\n")
    done = run("spawning", folder, "out.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits)


LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""
MODULES = """
import sys
from importlib import util
assert util.find_spec("transformers") is not None  # As programs do that can do without it.
before = sorted({"torch", "transformers", "moe_ops", "runpy"} & sys.modules.keys())
import transformers
print(before, "moe_ops.hf" in sys.modules)
"""


@pytest.fixture
def fresh(tmp_path):
    """The Python of a new environment that has the packages of this one."""
    venv.create(tmp_path / "new", symlinks=True)
    (packages,) = (tmp_path / "new").glob("lib/python*/site-packages")
    (packages / "paths.pth").write_text("\n".join(p for p in sys.path if os.path.isdir(p)))
    return tmp_path / "new" / "bin" / "python"


def test_processes_of_a_program_after_install(checkpoint, tmp_path, fresh):
    folder, logits = checkpoint
    for name, text in (("launcher", LAUNCHER), ("program", PROGRAM), ("modules", MODULES)):
        (tmp_path / f"{name}.py").write_text(text)
    line = ["-m", "moe_ops", "run"]
    launched = [*line, "launcher.py", "program.py", folder, "out.pt"]
    done = python(*launched, cwd=tmp_path, program=fresh)
    assert done.returncode == 1 and "Unknown quantization type, got moe_ops" in done.stderr
    done = python(*line, "--install", cwd=tmp_path, program=fresh)
    assert done.returncode == 0 and "MOE_OPS_TRANSFORMERS=1" in done.stdout, done.stderr
    done = python(*launched, cwd=tmp_path, program=fresh)
    assert done.returncode == 3, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits)
    # Nothing is imported before transformers, and nothing at all without the variable.
    done = python("modules.py", cwd=tmp_path, program=fresh, MOE_OPS_TRANSFORMERS="1")
    assert done.stdout == "['runpy'] True\n", done.stderr
    done = python("modules.py", cwd=tmp_path, program=fresh)
    assert done.stdout == "[] False\n", done.stderr
    for word in ("Removed", "Not there"):
        done = python(*line, "--uninstall", cwd=tmp_path, program=fresh)
        assert done.returncode == 0 and done.stdout.startswith(f"{word}: "), done.stderr
    done = python("modules.py", cwd=tmp_path, program=fresh, MOE_OPS_TRANSFORMERS="1")
    assert done.stdout == "[] False\n", done.stderr


@pytest.mark.parametrize("words", [["--install", "--uninstall"], ["--install", "x.py"]])
def test_install_stands_alone(tmp_path, words):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: run: --install and --uninstall must be alone")

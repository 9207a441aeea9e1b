"""moe-ops run: programs that import nothing of moe_ops open its checkpoints."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
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
    return subprocess.run(
        [sys.executable, "-m", "moe_ops.cli", "run", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
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

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.fresh_python import run_python
from typer.testing import CliRunner

import moe_ops
from moe_ops.cli import MISSING_EXTRA
from moe_ops.cli.app import app

runner = CliRunner()


def test_help_lists_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("doctor", "demo", "bench", "quantize", "prune", "plan", "zoo"):
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
    assert "needs safetensors, which is not installed: pip install" in result.stderr
    assert "Traceback" not in result.stderr


# --- what goes wrong ends in one sentence


def invoke(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


DEMO = ("demo", "--smoke")


@pytest.mark.parametrize(
    "arguments",
    [
        (*DEMO, "--steps", "1e23"),
        (*DEMO, "--steps", str(10**23)),
        (*DEMO, "--steps", "0"),
        (*DEMO, "--seed", str(10**23)),
        (*DEMO, "--threads", "100000000"),
        ("bench", "--threads", "100000000"),
        ("quantize", "a", "b", "--tokens", str(10**23)),
        ("quantize", "a", "b", "--context", str(10**23)),
    ],
    ids=" ".join,
)
def test_numbers_out_of_range(arguments):
    code, output = invoke(*arguments)
    assert code == 2
    assert "Invalid value" in output and arguments[-2] in output


@pytest.mark.parametrize("name", ["file", "file/deeper", "file/[/x]"])
def test_file_where_a_folder_is_needed(tmp_path, name):
    (tmp_path / "file").write_text("text")
    code, output = invoke(*DEMO, "--out", tmp_path / name)
    assert code == 1
    assert (
        output == f"error: {tmp_path / name} cannot be written: it must be a folder, got a file\n"
    )


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "[red]a[/red]", "a\udcff"])
def test_paths_are_printed_as_they_are(tmp_path, name):
    shown = f"{tmp_path}/{name}".replace("\udcff", "\\udcff")
    for arguments in (
        (*DEMO, "--out", tmp_path, "--data", tmp_path / name),
        (*DEMO, "--out", tmp_path / name, "--resume"),
        ("quantize", tmp_path / name, tmp_path / "out"),
    ):
        code, output = invoke(*arguments)
        assert code == 1
        assert output.splitlines()[-1].startswith("error: ") and shown in output, output


def test_names_are_printed_as_they_are():
    code, output = invoke("quantize", "[/x]", "out")
    assert code == 1 and "[/x]" in output


def test_full_standard_output():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    code = (
        "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        "from moe_ops.cli import main\n"
        "main(['zoo', 'list'])"
    )
    result = run_python("-c", code)
    assert result.returncode == 1
    assert result.stderr.endswith("No space left on device\n")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("moe_ops.doctor.examine", ("doctor",)),
        ("moe_ops.demo.run.run_demo", ("demo",)),
        ("moe_ops.bench.measure.run", ("bench",)),
        ("moe_ops.cli.quantize.run", ("quantize", "a", "b")),
        ("moe_ops.cli.zoo.print_listing", ("zoo", "list")),
    ],
)
def test_interrupted_commands(monkeypatch, function, arguments):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if "quantize" in function:
        pytest.importorskip("transformers")
    monkeypatch.setattr(function, interrupt)
    code, output = invoke(*arguments)
    assert code == 130
    assert "topped" in output and len(output.strip().splitlines()) == 1


def test_interrupted_training_is_saved(tmp_path):
    """Ctrl-C in a process of its own: there is a checkpoint, and the line says how to go on."""
    (tmp_path / "text").write_text("the router sends every token to its experts\n" * 200)
    code = (
        "import os, signal, sys\n"
        "from moe_ops.demo.train import Trainer\n"
        "step = Trainer.train_step\n"
        "def interrupted(self):\n"
        "    if self.step == 6:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self)\n"
        "Trainer.train_step = interrupted\n"
        "from moe_ops.cli import main\n"
        "main(sys.argv[1:])"
    )
    out = tmp_path / "out [/x]"
    line = [*DEMO, "--threads", "1", "--data", str(tmp_path / "text"), "--out", str(out)]
    result = run_python("-c", code, *line)
    assert result.returncode == 130, result.stderr
    assert result.stdout.endswith(f"Continue with: moe-ops demo --resume --out '{out}'\n")
    from moe_ops._state import read_state

    assert 1 <= read_state(out / "checkpoint.pt")["step"] <= 6

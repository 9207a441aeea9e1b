"""moe-ops run: another Python program, in a process in which transformers knows moe_ops."""

from __future__ import annotations

import os
import runpy
import sys
import sysconfig
from collections.abc import Sequence
from importlib import import_module, util
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from rich.console import Console

from moe_ops._files import write_text

VARIABLE = "MOE_OPS_TRANSFORMERS"
HOOK_NAME = "moe_ops_transformers.pth"
_START_UP = str(Path(__file__).with_name("startup.py"))


def set_up(
    words: Sequence[str],
    install: bool,
    uninstall: bool,
    console: Console,
    folder: Path | None = None,
) -> None:
    """Writes or removes the file that makes each start of this environment's Python run startup.py,
    if the variable is set.

    Raises:
        ValueError: both options, or a program.
        OSError: the folder cannot be written.
    """
    if words or (install and uninstall):
        raise ValueError("run: --install and --uninstall must be alone, got more.")
    path = (folder or Path(sysconfig.get_path("purelib"))) / HOOK_NAME
    if uninstall:
        there = path.exists()
        path.unlink(missing_ok=True)
        console.print(
            f"{'Removed' if there else 'Not there'}: {path}", markup=False, soft_wrap=True
        )
        return
    write_text(path, _HOOK.format(variable=VARIABLE, script=_START_UP))
    console.print(
        f"Written: {path}\nProcesses of this Python know moe_ops where {VARIABLE}=1 is set, as "
        "moe-ops run does for the processes of a program.",
        markup=False,
        soft_wrap=True,
    )


# site runs a line that begins with "import"; nothing is imported without the variable.
_HOOK = (
    'import os; os.environ.get("{variable}") == "1" and __import__("runpy").run_path({script!r})\n'
)


def prepare(words: Sequence[str]) -> None:
    """Checks the words of a command, and makes transformers know moe_ops in this process.

    Raises:
        ValueError: no program, or one that is neither a command of this environment, nor a file of
            Python, nor "-m" and a module.
        ImportError: transformers is missing or too old.
    """
    if not words or words == ["-m"]:
        raise ValueError(
            "run: PROGRAM must be a command, a file of Python or -m MODULE, got nothing."
        )
    name = words[0]
    if name == "-m":
        if not _has_module(words[1]):
            raise ValueError(f"run: MODULE must be installed, got {words[1]}.")
    elif not name.endswith(".py") and _command(name) is None:
        raise ValueError(
            "run: PROGRAM must be a command of this Python environment, a file of Python or -m "
            f"MODULE, got {name}."
        )
    import_module("moe_ops.hf")
    os.environ[VARIABLE] = "1"  # For processes that it starts, after `--install`.


def run_program(words: Sequence[str]) -> None:
    """Runs a program with its arguments in this process, as `prepare` has accepted it.

    Raises:
        SystemExit: the program has ended with a status.
    """
    sys.excepthook = sys.__excepthook__  # Typer's would draw a program's errors in a box.
    name, *arguments = words
    if name == "-m":
        sys.argv = [arguments[0], *arguments[1:]]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
        return
    command = _command(name)
    assert command is not None
    # Processes that the command spawns with multiprocessing begin with the file of `__main__`.
    main = sys.modules["__main__"]
    main.__spec__, main.__file__ = None, _START_UP
    sys.exit(command.load()())


def _command(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def _has_module(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except ModuleNotFoundError:  # Of a package that does not exist.
        return False

"""moe-ops run: another Python program, in a process in which transformers knows moe_ops."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib import import_module, util
from importlib.metadata import EntryPoint, entry_points


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
    sys.exit(command.load()())


def _command(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def _has_module(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except ModuleNotFoundError:  # Of a package that does not exist.
        return False

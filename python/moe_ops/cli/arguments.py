"""Types of arguments, with their ranges, and the handling of errors in commands."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from moe_ops import _arguments as ranges
from moe_ops._files import describe

P = ParamSpec("P")
T = TypeVar("T")

INTERRUPTED = 130  # 128 + SIGINT, the convention of shells.


def _finite(value: float | None) -> float | None:
    # NaN passes every range check: all comparisons with it are false.
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def steps(help: str) -> Any:
    return typer.Option(min=1, max=ranges.MAX_STEPS, help=help)


def threads(help: str) -> Any:
    return typer.Option(min=1, max=ranges.MAX_THREADS, help=help)


def seed(help: str) -> Any:
    return typer.Option(min=0, max=ranges.MAX_SEED, help=help)


def tokens(help: str, least: int) -> Any:
    return typer.Option(min=least, max=ranges.MAX_TOKENS, help=help)


def size(help: str) -> Any:
    return typer.Option(min=0.0, callback=_finite, help=help)


def share(help: str) -> Any:
    return typer.Option(min=0.0, max=1.0, callback=_finite, help=help)


def fail(message: object) -> typer.Exit:
    """Prints one sentence to stderr, and returns an exit with status 1 to be raised."""
    console = Console(stderr=True, highlight=False)
    console.print(f"error: {message}", style="bold red", soft_wrap=True, markup=False)
    return typer.Exit(1)


def command(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a command to end errors with one sentence and a status instead of a traceback.

    Errors of the package for invalid input or failed file access are already sentences; Ctrl-C ends
    with one line and status 130.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        # A path or a text may contain characters that the terminal cannot show.
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="backslashreplace")
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()  # A full disk raises here, instead of at exit without a message.
            return result
        except KeyboardInterrupt:
            Console(stderr=True, highlight=False).print("Stopped.")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of a pipe has exited, as in `moe-ops ... | head`; click ends quietly.
            raise
        except OSError as error:
            raise fail(describe(error)) from None
        except (ValueError, ArithmeticError, ImportError) as error:
            raise fail(error) from None

    return run

"""Loading of the native library, with errors that state a remedy."""

from __future__ import annotations

import importlib
from types import ModuleType


def _interpreters() -> ModuleType | None:
    for name in ("_interpreters", "_xxsubinterpreters"):  # from Python 3.13 on, and before
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _check_interpreter() -> None:
    """Rejects subinterpreters: importing torch there ends the process (torch 2.13), so this check
    comes first."""
    interpreters = _interpreters()
    if interpreters is not None and interpreters.get_current() != interpreters.get_main():
        raise ImportError(
            "moe_ops runs in the main interpreter of a process only, as torch does, and was "
            "imported into a subinterpreter: use threads or processes instead."
        )


_check_interpreter()

import torch  # noqa: E402


def torch_version() -> tuple[int, int]:
    """Returns the major and minor version of torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def load(version: str) -> None:
    """Loads the native library, which registers ``torch.ops.moe_ops``.

    Args:
        version: version of the Python files, which the library must have too.

    Raises:
        ImportError: torch is older than 2.10, or the library is missing or incompatible.
    """
    if torch_version() < (2, 10):
        raise ImportError(
            f"moe_ops needs torch 2.10 or newer and found {torch.__version__}: "
            "pip install --upgrade torch"
        )
    try:
        from moe_ops import _library

        found = _library.version()
    except FileNotFoundError as error:
        raise ImportError(
            f"moe_ops is not built here ({error} is missing): run `pip install "
            "--no-build-isolation .` in its source folder, and start Python outside that folder."
        ) from error
    except OSError as error:
        raise ImportError(
            f"the native library of moe_ops does not load with torch {torch.__version__}: {error}. "
            "Reinstall it: pip install --force-reinstall --no-deps torch-moe-ops"
        ) from error
    except AttributeError:  # It lacks a function.
        found = "of another version"
    if found != version:
        raise ImportError(
            f"moe_ops is {version} but its native library is {found}: two installs are "
            "mixed; pip uninstall torch-moe-ops until none is left, then install it again."
        )
    if _library.isa_warning():
        import warnings

        warnings.warn(_library.isa_warning(), RuntimeWarning, stacklevel=3)

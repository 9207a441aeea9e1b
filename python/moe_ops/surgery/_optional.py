"""Optional packages, imported where they are needed, each with a sentence where it is missing."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# What was asked for -> the extra of this distribution that brings it.
_EXTRAS = {"safetensors": "surgery", "scipy": "surgery", "transformers": "hf"}


def optional(caller: str, module: str) -> Any:
    """The module; ImportError with a sentence where its package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(
            f"{caller} needs {package}, which is not installed: "
            f"pip install torch-moe-ops[{_EXTRAS[package]}]"
        ) from error


def safetensors_torch(caller: str) -> Any:
    """save(tensors, metadata) -> bytes, safe_open and SafetensorError."""
    library = optional(caller, "safetensors")
    return SimpleNamespace(
        save=optional(caller, "safetensors.torch").save,
        safe_open=library.safe_open,
        SafetensorError=library.SafetensorError,
    )


@contextlib.contextmanager
def saved_by(owner: str, path: Path | str, format: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """A safetensors file that `owner`.save has written, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is something else, which what is done inside may find out too.
    """
    library = safetensors_torch(f"{owner}.load")
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise ValueError(f"it has the format {metadata.get('format')!r}")
            yield file, metadata
    except (library.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{owner}.load: {path} must be a file of {owner}.save, got something else: {error}."
        ) from error

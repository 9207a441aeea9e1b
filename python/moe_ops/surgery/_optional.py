"""Imports of optional packages, with an error message if a package is missing."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_ops import _files, _reading, _tensor_file

# Package -> the extra of this distribution that installs it.
_EXTRAS = {"safetensors": "surgery", "scipy": "surgery", "transformers": "hf"}


def optional(caller: str, module: str) -> Any:
    """Returns the module; raises ImportError with installation advice if its package is missing."""
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


def save_tensors(
    owner: str, path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file for `saved_by`, with a checksum of tensors and metadata.

    Raises:
        OSError: it could not be written.
        ImportError: safetensors is missing.
    """
    library = optional(f"{owner}.save", "safetensors.torch")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {**metadata, "sha256": _tensor_file.digest(whole, metadata)}
    _files.write_file(path, library.save(whole, about))


def names_in(text: str) -> list[str]:
    """Returns the list of names in a JSON text.

    Raises:
        ValueError: it contains something else.
    """
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its names are {_files.shown(names)}")
    return names


@contextlib.contextmanager
def saved_by(
    owner: str, path: Path | str, format: str
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Yields the tensors and the metadata of a file written by `owner`.save.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a regular file, it does not match its checksum (which files of earlier
            versions do not have), or it has another format, which may also be detected inside the
            context.
    """
    reader = f"{owner}.load"
    library = optional(reader, "safetensors.torch")
    content = _reading.read_bytes(path, reader)
    with _reading.damage(reader, path, f"a file of {owner}.save"):
        tensors = library.load(content)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        metadata = dict(json.loads(header).get("__metadata__") or {})
        if metadata.get("format") != format:
            raise ValueError(f"it has the format {_files.shown(metadata.get('format'))}")
        said = metadata.pop("sha256", None)
        if said is not None and said != _tensor_file.digest(tensors, metadata):
            raise ValueError("it does not match its checksum")
        yield tensors, metadata

"""Dicts of tensors and numbers in files: `torch.save`, written whole or not at all."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from moe_ops import _files


def write_state(path: Path | str, state: dict[str, Any]) -> None:
    """Writes what `torch.save` makes of the state, in place of a file in one step."""
    content = io.BytesIO()
    torch.save(state, content)
    _files.write_file(path, content.getbuffer())


def read_state(path: Path | str, device: str = "cpu") -> dict[str, Any]:
    """Returns the dict in a file of `torch.save`.

    Raises:
        ValueError: the file does not match its checksums, or holds something else.
    """
    content = io.BytesIO(Path(path).read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:  # torch.load skips the archive's checksums.
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not match")
        content.seek(0)
        state = torch.load(content, map_location=device, weights_only=True)
    except (
        EOFError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"read_state: {path} must be an intact file of torch.save, got: {reason}. Remove it to "
            "start again."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"read_state: {path} must hold a dict, got {_files.shown(state)}.")
    return state

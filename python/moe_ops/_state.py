"""Dicts of tensors and numbers in files: `torch.save`, written whole or not at all."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _files, _reading


def write_state(path: Path | str, state: dict[str, Any]) -> None:
    """Writes what `torch.save` makes of the state, in place of a file in one step."""
    content = io.BytesIO()
    torch.save(state, content)
    _files.write_file(path, content.getbuffer())


def read_state(path: Path | str, device: str = "cpu") -> dict[str, Any]:
    """Returns the dict in a file of `torch.save`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file, does not match its checksums, or holds something
            else.
    """
    content = io.BytesIO(_reading.read_bytes(path, "read_state"))
    wanted = "an intact file of torch.save (remove it to start again)"
    with _reading.damage("read_state", path, wanted):
        with zipfile.ZipFile(content) as archive:  # torch.load skips the archive's checksums.
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not match")
        content.seek(0)
        state: Any = torch.load(content, map_location=device, weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"read_state: {path} must hold a dict, got {_files.shown(state)}.")
    return state


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Puts the state dict that `write_state` wrote into a model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or of another model.
    """
    state = read_state(path)
    with _reading.damage("fit", path, f"the weights of this {type(model).__name__}"):
        model.load_state_dict(state)

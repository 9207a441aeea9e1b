"""Dicts of tensors and numbers in files: `torch.save`, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _files, _reading


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


def write_about(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file of what a model is made of, with a checksum of its values."""
    _files.write_json(path, {**values, "sha256": _digest_of(values)})


def read_about(path: Path) -> dict[str, Any]:
    """Reads what `write_about` wrote; files of earlier versions have no checksum.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no JSON object, or differs from its checksum.
    """
    try:
        values = _files.read_json(path)
    except ValueError as error:
        raise ValueError(f"load: {error}.") from None
    said = values.pop("sha256", None)
    if said is not None and said != _digest_of(values):
        raise ValueError(f"load: {path} must match its checksum, got one that is damaged.")
    return values


def _digest_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_made(
    about: Path, weights: Path, make: Callable[[dict[str, Any]], tuple[nn.Module, Any]]
) -> Any:
    """Makes a model of what `write_about` wrote, and loads its weights.

    Args:
        about: the file that says what to make. weights: that of `write_state`.
        make: from the values of `about` the dense model that it starts from, and a function that
            makes the whole model of that one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, or sizes that are not those of the weights; these are compared
            before the model takes memory.
    """
    values, state = read_about(about), read_state(weights)
    tensors = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
    most = max([len(tensors), *(size for tensor in tensors for size in tensor.shape)])
    with _reading.damage("load", about, "a description of the model whose weights are beside it"):
        for name, value in _counts(values):
            if value > most:
                raise ValueError(f"{name} is {value} where no size of a weight is above {most}")
        with torch.device("meta"):
            skeleton, _ = make(values)
        wanted = sum(p.numel() for p in skeleton.parameters())
        if wanted > sum(tensor.numel() for tensor in tensors):
            raise ValueError(f"it takes {wanted} numbers, which are more than the weights have")
        dense, finish = make(values)
        model = finish(dense)
        model.load_state_dict(state)
    return model


def _counts(values: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Gives the numbers of layers, heads, experts and so on in nested values."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _counts(value, str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _counts(value, name)
    elif type(values) is int and (name.startswith("num_") or "layers" in name or "depths" in name):
        yield name, values

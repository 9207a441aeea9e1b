"""Tensors of safetensors files that others wrote, read when they are asked for."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moe_ops import _reading

_READER = "from_pretrained"
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py")


class Checkpoint:
    """Tensors of safetensors files.

    Args:
        files: their names.
        kind: what they are to be, for sentences: "gptq checkpoint".

    Raises:
        FileNotFoundError: no such file.
        ValueError: one is no regular file, or damaged.
    """

    def __init__(self, files: Sequence[str], kind: str = "checkpoint") -> None:
        self.kind = kind
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in files:
            with _reading.damage(_READER, file, "a whole safetensors file"):
                _reading.check_safetensors(file, _READER)
                self._open[file] = safe_open(file, framework="pt")
                self._file_of |= dict.fromkeys(self._open[file].keys(), file)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def keys(self) -> Sequence[str]:
        return list(self._file_of)

    def reading(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Turns whatever is raised while a weight is read into one sentence with its file.

        Args:
            name: the key of a tensor, or what the keys of a weight begin with.
        """
        file = self._file_of.get(name)
        if file is None:
            under = (f for key, f in self._file_of.items() if key.startswith(name))
            file = next(under, next(iter(self._open), "the checkpoint"))
        return _reading.damage(_READER, file, f"a {self.kind} that holds {name}")

    def get(self, key: str) -> Tensor:
        with self.reading(key):
            tensor: Tensor = self._slice_file(key).get_tensor(key)
        return tensor

    def optional(self, key: str) -> Tensor | None:
        return self.get(key) if key in self else None

    def slice_of(self, key: str) -> Any:
        """Returns what safetensors reads parts of a tensor from, by an index."""
        return self._slice_file(key).get_slice(key)

    def shape(self, key: str) -> list[int]:
        with self.reading(key):
            shape: list[int] = self.slice_of(key).get_shape()
        return shape

    def dtype(self, key: str) -> str:
        with self.reading(key):
            dtype: str = self.slice_of(key).get_dtype()
        return dtype

    def check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        """Checks that tensors which the files and a model call alike have one shape.

        Args:
            tensors: the model's, by name.

        Raises:
            ValueError: one has another shape in its file.
        """
        for key, file in self._file_of.items():
            if key in tensors and list(tensors[key].shape) != self.shape(key):
                raise ValueError(
                    f"{_READER}: {key} in {file} must have shape {list(tensors[key].shape)}, got "
                    f"{self.shape(key)}."
                )

    def _slice_file(self, key: str) -> Any:
        if key not in self:
            file = next(iter(self._open), "no file")
            raise ValueError(f"{_READER}: the checkpoint must hold {key}, got none in {file}.")
        return self._open[self._file_of[key]]


def put(target: Tensor, value: Tensor, name: str) -> None:
    """Copies a tensor of a file into a layer's; nothing is broadcast or converted.

    Raises:
        ValueError: another shape or type.
    """
    if value.shape != target.shape or value.dtype != target.dtype:
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)} in place of {target.dtype} "
            f"{list(target.shape)}"
        )
    target.copy_(value)


def copy_rest(source: Path, target: Path, excepted: set[str]) -> None:
    """Copies the tokenizer, chat template and other files of a checkpoint that are no weights."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json")
        if path.is_file() and wanted and path.name not in excepted:
            shutil.copyfile(path, target / path.name)

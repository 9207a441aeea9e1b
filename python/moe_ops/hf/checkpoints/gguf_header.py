"""The header of a GGUF file, walked before another library reads the file: such readers believe
the counts and lengths in it, and some go on for ever beyond the end."""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

from moe_ops import _reading

_READER = "from_pretrained"
_VERSIONS = (2, 3)
# Number of a type of a value -> its bytes; strings and arrays have lengths of their own.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 2**62
_ALIGNMENT = 32  # Of the data, where the file names no other.


class GgufTensor(NamedTuple):
    """Place of a tensor in a GGUF file: shape in the order of torch, number of its type, and first
    byte after the header."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def check_gguf(path: Path | str) -> dict[str, GgufTensor]:
    """Checks that a GGUF file is whole; returns its tensors by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file, no GGUF file, or lacks something that its header names.
        ImportError: the package gguf is missing.
    """
    import gguf

    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    with (
        _reading.open_regular(path, _READER) as file,
        _reading.damage(_READER, path, "a whole GGUF file"),
    ):
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise ValueError(f"it has {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            walk = _Walk(content, size)
            tensors, start = walk.header()
        for name, tensor in tensors.items():
            if tensor.kind not in sizes:
                raise ValueError(f"{name} is of type {tensor.kind}")
            block, block_bytes = sizes[tensor.kind]
            count = math.prod(tensor.shape)
            row = tensor.shape[-1] if tensor.shape else 1
            if count > _MAX_ELEMENTS or row % block:
                raise ValueError(f"{name} cannot have shape {list(tensor.shape)}")
            if start + tensor.offset + count // block * block_bytes > size:
                raise ValueError(f"{name} ends behind the file")
        return tensors


class _Walk:
    """Reads a header from its start on. Errors are ValueError, struct.error and the like."""

    def __init__(self, content: mmap.mmap, size: int) -> None:
        self.content = content
        self.size = size
        self.place = 0

    def header(self) -> tuple[dict[str, GgufTensor], int]:
        """Returns the tensors, and where the data begins."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_values = self._numbers("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"it is of version {version}")
        names = set()
        alignment = _ALIGNMENT
        for _ in range(num_values):
            name = self._string()
            if name in names:
                raise ValueError(f"it names {name} twice")
            names.add(name)
            (kind,) = self._numbers("<I")
            if name == "general.alignment":
                if kind != _UINT32:
                    raise ValueError(f"its alignment is of type {kind}")
                (alignment,) = self._numbers("<I")
                if not alignment or alignment & (alignment - 1):
                    raise ValueError(f"its alignment is {alignment}")
            else:
                self._skip(kind)
        tensors = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in tensors:
                raise ValueError(f"it has two tensors called {name}")
            (num_dimensions,) = self._numbers("<I")
            if num_dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"{name} has {num_dimensions} dimensions")
            shape = self._numbers(f"<{num_dimensions}Q")
            kind, offset = self._numbers("<IQ")
            tensors[name] = GgufTensor(tuple(reversed(shape)), kind, offset)
        return tensors, -(-self.place // alignment) * alignment

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            kind, count = self._numbers("<IQ")
            if kind == _STRING:
                for _ in range(count):
                    self._string()
            else:
                self._skip_bytes(count * self._width(kind))
        else:
            self._skip_bytes(self._width(kind))

    def _width(self, kind: int) -> int:
        if kind not in _WIDTHS:
            raise ValueError(f"a value is of type {kind}")
        return _WIDTHS[kind]

    def _numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _string(self) -> str:
        (length,) = self._numbers("<Q")
        return self._bytes(length).decode("utf-8")

    def _bytes(self, count: int) -> bytes:
        start = self.place
        self._skip_bytes(count)
        return self.content[start : self.place]

    def _skip_bytes(self, count: int) -> None:
        if count > self.size - self.place:
            raise ValueError(f"it ends before {count} bytes from byte {self.place} on")
        self.place += count

"""Storage of expert weights that are not on the device: in memory, or in files.

Letters: E experts per layer, H hidden size, I intermediate size.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops import _files, _reading
from moe_ops._tensor_file import fits

Key = tuple[int, int]  # Index of a module of experts, and of an expert in it
# One expert: name of a tensor -> its parts, concatenated along dimension 0.
Parts = Mapping[str, Sequence[Tensor]]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 64  # Of the first tensor of a file; others are aligned by their sizes.
_READ_BYTES = 256 << 10  # Bytes read at a time of values that are converted or transposed


class Stored(NamedTuple):
    """Shape and dtype of one tensor of an expert, as in slots."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ExpertStore:
    """Experts of several modules in one format, each read on demand.

    Attributes:
        tensors: name -> Stored, for one expert; equal for all.
        num_banks, num_experts: number of modules, and E of each.
    """

    def __init__(self, tensors: Mapping[str, Stored], num_banks: int, num_experts: int) -> None:
        self.tensors = dict(tensors)
        self.num_banks = num_banks
        self.num_experts = num_experts

    @property
    def expert_bytes(self) -> int:
        """Returns the bytes of one expert in a slot."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    @property
    def pinned(self) -> bool:
        """True if `read` copies only from pinned memory, so that it may be non-blocking."""
        return False

    def read(self, key: Key, into: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Copies one expert into tensors with the shapes of `tensors`."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees its resources; nothing can be read afterwards."""


@torch.no_grad()
def copy_parts(target: Tensor, parts: Sequence[Tensor], non_blocking: bool = False) -> None:
    """Copies parts into consecutive rows of `target`."""
    row = 0
    for part in parts:
        target[row : row + part.shape[0]].copy_(part, non_blocking=non_blocking)
        row += part.shape[0]


class MemoryStore(ExpertStore):
    """Experts in CPU memory.

    Args:
        banks: for each module, name -> parts, each [E, rows, ...].
        pin: copy them to pinned memory, from which CUDA copies asynchronously.
    """

    def __init__(self, banks: Sequence[Parts], *, pin: bool = False) -> None:
        super().__init__(forms(banks[0]), len(banks), next(iter(banks[0].values()))[0].shape[0])
        self._banks: list[Parts] = [
            {n: [_held(p, pin) for p in parts] for n, parts in bank.items()} for bank in banks
        ]

    @property
    def pinned(self) -> bool:
        return all(p.is_pinned() for bank in self._banks for parts in bank.values() for p in parts)

    def read(self, key: Key, into: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        bank, expert = key
        for name, parts in self._banks[bank].items():
            copy_parts(into[name], [part[expert] for part in parts], non_blocking)

    def close(self) -> None:
        self._banks = []


def _held(part: Tensor, pin: bool) -> Tensor:
    part = part.detach()
    if pin:
        return part.cpu().contiguous().pin_memory()
    return part.cpu()


def forms(bank: Parts) -> dict[str, Stored]:
    """Returns `ExpertStore.tensors` of experts in parts [E, rows, ...]."""
    return {
        name: Stored((sum(p.shape[1] for p in parts), *parts[0].shape[2:]), parts[0].dtype)
        for name, parts in bank.items()
    }


class Piece(NamedTuple):
    """Part of an expert's tensor in a file: `shape` values from byte `offset` on.

    Attributes:
        transposed: the last two dimensions are swapped in the file.
        crc32: of its bytes, if the file contains it.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False
    crc32: int | None = None

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def rows(self) -> Iterator[Piece]:
        """Yields the rows in file order, in pieces of at most `_READ_BYTES` or of one row."""
        num_rows = self.shape[0]
        row_bytes = self.num_bytes // max(1, num_rows)
        step = max(1, _READ_BYTES // max(1, row_bytes))
        for first in range(0, num_rows, step):
            shape = (min(step, num_rows - first), *self.shape[1:])
            yield self._replace(offset=self.offset + first * row_bytes, shape=shape)


class FileStore(ExpertStore):
    """Experts in safetensors files, each read into its slot.

    In addition to the slots it takes no memory of the process, except 256 KiB or one row per
    reading thread if values are converted or transposed. The system can evict its file cache.

    The first read of an expert verifies the checksum that `save_experts` wrote into the file; other
    files have none.

    Args:
        experts: for each module and expert: name -> pieces, concatenated.
        tensors: format of the slots; values of another float dtype are converted when read.
        keep_cached: leave read data in the system's file cache. False asks the system to drop it,
            so that each read is from the disk.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Mapping[str, Sequence[Piece]]]],
        tensors: Mapping[str, Stored],
        *,
        keep_cached: bool = True,
    ) -> None:
        super().__init__(tensors, len(experts), len(experts[0]))
        self.keep_cached = keep_cached
        self.experts = experts
        paths = {p.file for bank in experts for e in bank for parts in e.values() for p in parts}
        self._files = {path: _File(path) for path in sorted(paths)}
        self._checked: set[Key] = set()

    @classmethod
    def open(cls, path: Path | str, *, keep_cached: bool = True) -> FileStore:
        """Opens a file written by `save_experts`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is another kind of file, or its header does not match its checksum.
        """
        path = Path(path)
        stored = read_header(path)
        banks: dict[int, dict[int, dict[str, list[Piece]]]] = {}
        for key, piece in stored.items():
            bank, expert, name = _parse(path, key)
            banks.setdefault(bank, {}).setdefault(expert, {})[name] = [piece]
        if not banks:
            raise ValueError(f"FileStore: {path} must hold experts, got none.")
        counts = [len(banks[b]) for b in sorted(banks)]
        numbers = {(b, e) for b in banks for e in banks[b]}
        if numbers != {(b, e) for b, count in enumerate(counts) for e in range(count)}:
            raise ValueError(
                f"FileStore: {path} must hold all experts of its banks, got some without a number "
                "in between."
            )
        experts = [[banks[b][e] for e in sorted(banks[b])] for b in sorted(banks)]
        found = [[_form(expert) for expert in bank] for bank in experts]
        if any(bank != [found[0][0]] * len(found[0]) for bank in found):
            raise ValueError(f"FileStore: {path} must hold experts of one form, got several.")
        tensors = found[0][0]
        return cls(experts, tensors, keep_cached=keep_cached)

    def read(self, key: Key, into: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Copies one expert into tensors with the shapes of `tensors`.

        Raises:
            OSError: a file cannot be read, or ends too soon.
            ValueError: an expert, at its first read, does not match its checksum.
        """
        bank, expert = key
        first = key not in self._checked
        for name, pieces in self.experts[bank][expert].items():
            row = 0
            for piece in pieces:
                num_rows = piece.shape[-1 if piece.transposed else 0]
                check = first and piece.crc32 is not None
                found = self._copy(piece, into[name][row : row + num_rows], check)
                if check and found != piece.crc32:
                    raise ValueError(
                        f"FileStore: {name} of expert {expert} of bank {bank} in {piece.file} must "
                        f"match its checksum {piece.crc32:08x}, got {found:08x}."
                    )
                row += num_rows
        self._checked.add(key)

    @torch.no_grad()
    def _copy(self, piece: Piece, target: Tensor, check: bool) -> int:
        """Copies a piece; returns the CRC-32 of its bytes in the file with `check`, else 0."""
        found = 0
        file = self._files[piece.file]
        if piece.transposed:
            target = target.transpose(-1, -2)
        if target.dtype == piece.dtype and target.device.type == "cpu" and target.is_contiguous():
            file.read(piece.offset, _buffer(target))
            found = zlib.crc32(_buffer(target)) if check else 0
        else:
            row = 0
            for rows in piece.rows():
                read = torch.empty(rows.shape, dtype=rows.dtype)
                file.read(rows.offset, _buffer(read))
                found = zlib.crc32(_buffer(read), found) if check else 0
                target[row : row + len(read)].copy_(read)
                row += len(read)
        if not self.keep_cached:
            file.drop(piece.offset, piece.num_bytes)
        return found

    def drop_cached(self) -> None:
        """Asks the system to drop the files from its cache, so that later reads are from the
        disk."""
        for file in self._files.values():
            file.drop(0, 0)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


def _form(expert: Mapping[str, Sequence[Piece]]) -> dict[str, Stored]:
    return {name: Stored(piece.shape, piece.dtype) for name, (piece,) in expert.items()}


class _File:
    """File read by several threads. It is not memory-mapped: the system may map 2 MiB around each
    touched address, which would leave the memory of the process without a tight bound."""

    def __init__(self, path: Path) -> None:
        self._file: Any = _reading.open_regular(path, "FileStore")
        self._turn = threading.Lock()

    def read(self, offset: int, into: Any) -> None:
        """Fills a buffer from byte `offset` on, while other Python threads run.

        Raises:
            OSError: the file ends too soon.
        """
        done = 0
        while done < len(into):
            count = self._read_some(offset + done, into[done:])
            if not count:
                raise OSError(
                    f"FileStore: {self._file.name} must have {offset + len(into):,} bytes, got "
                    f"{offset + done:,}."
                )
            done += count

    def _read_some(self, offset: int, into: Any) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into], offset)
        with self._turn:
            self._file.seek(offset)
            return self._file.readinto(into) or 0

    def drop(self, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._file.close()


def read_header(path: Path) -> dict[str, Piece]:
    """Returns the tensors of a safetensors file, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, one that ends too soon, or one of `save_experts` whose
            header does not match its checksum.
    """
    with _reading.open_regular(path, "FileStore") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _files.MAX_JSON_BYTES):
            raise ValueError(f"FileStore: {path} must be a safetensors file, got something else.")
        text = file.read(length)
    with _reading.damage("FileStore", path, "a whole safetensors file"):
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        marks = _marks(header, metadata)
        found = {}
        for number, (name, entry) in enumerate(header.items()):
            kind, shape = entry["dtype"], entry["shape"]
            if not isinstance(kind, str):
                raise ValueError(f"{_files.shown(name)} is of {_files.shown(kind)}")
            if kind not in _DTYPES:
                continue
            first, last = entry["data_offsets"]
            dtype = _DTYPES[kind]
            if not fits(shape, first, last, dtype.itemsize, size - 8 - length):
                raise ValueError(f"{_files.shown(name)} does not fit into it")
            crc32 = int(marks[8 * number :][:8], 16) if marks else None
            piece = Piece(path, 8 + length + first, dtype, tuple(shape), crc32=crc32)
            found[name] = piece
        return found


def _marks(header: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Returns the checksums of a header's tensors, eight hexadecimal digits each, or "" for a file
    that is not from `save_experts`.

    Raises:
        ValueError: the header does not match its own checksum.
    """
    marks, said = metadata.get("crc32"), metadata.get("sha256")
    if marks is None and said is None:
        return ""
    if marks is None or said != _header_digest(header, marks) or len(marks) != 8 * len(header):
        raise ValueError("its header does not match its checksum")
    return marks


def _header_digest(header: Mapping[str, Any], marks: str) -> str:
    text = json.dumps([[name, entry] for name, entry in header.items()])
    return hashlib.sha256(f"{text} {marks}".encode()).hexdigest()


def _parse(path: Path, key: str) -> tuple[int, int, str]:
    bank, _, rest = key.partition(".")
    expert, _, name = rest.partition(".")
    numbers = all(part.isdecimal() and len(part) < 10 for part in (bank, expert))
    if not (numbers and name):
        raise ValueError(f"FileStore: {path} must hold experts alone, got {_files.shown(key)}.")
    return int(bank), int(expert), name


@torch.no_grad()
def save_experts(path: Path | str, banks: Iterable[Parts]) -> None:
    """Writes experts into one safetensors file, each tensor as ``BANK.EXPERT.NAME``.

    It allocates memory for one expert.

    Args:
        banks: see `MemoryStore`, all in one format.

    Raises:
        OSError: it could not be written; an existing file is then unchanged.
        ValueError: experts in several formats.
    """
    path, banks = Path(path), list(banks)
    tensors = forms(banks[0])
    if any(forms(bank) != tensors for bank in banks):
        raise ValueError("save_experts: banks must have one form, got several.")
    order = [
        (b, e, name)
        for b, bank in enumerate(banks)
        for e in range(next(iter(bank.values()))[0].shape[0])
        for name in sorted(tensors, key=lambda n: -tensors[n].dtype.itemsize)
    ]
    header: dict[str, Any] = {}
    offset = 0
    for b, e, name in order:
        stored = tensors[name]
        end = offset + stored.num_bytes
        kind = _NAMES[stored.dtype]
        header[f"{b}.{e}.{name}"] = {
            "dtype": kind,
            "shape": list(stored.shape),
            "data_offsets": [offset, end],
        }
        offset = end

    def beginning(marks: str) -> bytes:
        checks = {"format": "pt", "crc32": marks, "sha256": _header_digest(header, marks)}
        text = json.dumps({"__metadata__": checks, **header}).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    marks = []
    with _files.writing(path) as file:
        file.write(beginning("0" * 8 * len(order)))
        for b, e, name in order:
            whole = torch.cat([part[e].detach().cpu() for part in banks[b][name]])
            content = _buffer(whole)
            marks.append(f"{zlib.crc32(content):08x}")
            file.write(content)
        file.seek(0)
        file.write(beginning("".join(marks)))


def _buffer(tensor: Tensor) -> Any:
    assert sys.byteorder == "little"
    tensor = tensor.contiguous()
    array = ctypes.c_char * tensor.nbytes
    return memoryview(array.from_address(tensor.data_ptr())).cast("B") if tensor.nbytes else b""

"""Where the weights of experts lie while they are not on the device: in memory, or in files.

Letters: E experts of a bank, H hidden size, I intermediate size.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops import _files
from moe_ops.memory import MADV_DONTNEED, MADV_POPULATE_READ, MADV_WILLNEED, madvise

Key = tuple[int, int]  # Number of a bank, and of an expert in it.
# One expert: name of a tensor -> its parts, one below the other along dimension 0.
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
_ALIGNMENT = 64  # Of the first tensor of a file; what follows is as aligned as sizes are.


class Stored(NamedTuple):
    """Shape and type of one tensor of an expert, as slots hold it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ExpertStore:
    """Experts of several banks of one form, each read when it is asked for.

    Attributes:
        tensors: name -> Stored, of one expert; the same for all.
        num_banks, num_experts: banks, and E of each.
    """

    def __init__(self, tensors: Mapping[str, Stored], num_banks: int, num_experts: int) -> None:
        self.tensors = dict(tensors)
        self.num_banks = num_banks
        self.num_experts = num_experts

    @property
    def expert_bytes(self) -> int:
        """What one expert takes in a slot."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    def parts(self, key: Key) -> Parts:
        """The tensors of one expert, as views of where they lie."""
        raise NotImplementedError

    def read(self, key: Key, into: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Copies one expert into tensors of the shapes of `tensors`."""
        for name, parts in self.parts(key).items():
            copy_parts(into[name], parts, non_blocking)

    def close(self) -> None:
        """Lets go of what it holds; nothing can be read afterwards."""


@torch.no_grad()
def copy_parts(target: Tensor, parts: Sequence[Tensor], non_blocking: bool = False) -> None:
    """Copies parts into the rows of `target`, one below the other."""
    row = 0
    for part in parts:
        target[row : row + part.shape[0]].copy_(part, non_blocking=non_blocking)
        row += part.shape[0]


class MemoryStore(ExpertStore):
    """Experts in CPU memory.

    Args:
        banks: of each bank, name -> parts, each [E, rows, ...].
        pin: copy them to pinned memory, from which CUDA copies beside the host.
    """

    def __init__(self, banks: Sequence[Parts], *, pin: bool = False) -> None:
        super().__init__(forms(banks[0]), len(banks), next(iter(banks[0].values()))[0].shape[0])
        self._banks: list[Parts] = [
            {n: [_held(p, pin) for p in parts] for n, parts in bank.items()} for bank in banks
        ]

    def parts(self, key: Key) -> Parts:
        bank, expert = key
        return {n: [part[expert] for part in parts] for n, parts in self._banks[bank].items()}

    def close(self) -> None:
        self._banks = []


def _held(part: Tensor, pin: bool) -> Tensor:
    part = part.detach()
    if pin:
        return part.cpu().contiguous().pin_memory()
    return part.cpu()


def forms(bank: Parts) -> dict[str, Stored]:
    """`ExpertStore.tensors` of a bank of parts [E, rows, ...]."""
    return {
        name: Stored((sum(p.shape[1] for p in parts), *parts[0].shape[2:]), parts[0].dtype)
        for name, parts in bank.items()
    }


class Piece(NamedTuple):
    """A part of a tensor of an expert in a file: `shape` numbers from byte `offset` on."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class FileStore(ExpertStore):
    """Experts in safetensors files, which are mapped and read where they are.

    After an expert is copied its pages leave the memory of this process: what stays is the system's
    file cache, which gives way to whoever needs memory.

    Args:
        experts: bank by bank, expert by expert: name -> pieces, one below the other.
        tensors: what slots hold; numbers of another float type are converted as they are read.
        keep_cached: leave what was read in the system's file cache. False asks the system to drop
            it, so that each read is a read from the disk.
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
        self._files = {path: _MappedFile(path) for path in sorted(paths)}

    @classmethod
    def open(cls, path: Path | str, *, keep_cached: bool = True) -> FileStore:
        """The file that `write_experts` has written.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not such a file.
        """
        path = Path(path)
        stored = read_header(path)
        banks: dict[int, dict[int, dict[str, list[Piece]]]] = {}
        for key, piece in stored.items():
            bank, expert, name = _parse(path, key)
            banks.setdefault(bank, {}).setdefault(expert, {})[name] = [piece]
        if not banks:
            raise ValueError(f"FileStore: {path} must hold experts, got none.")
        experts = [[banks[b][e] for e in sorted(banks[b])] for b in sorted(banks)]
        found = [[_form(expert) for expert in bank] for bank in experts]
        if any(bank != [found[0][0]] * len(found[0]) for bank in found):
            raise ValueError(f"FileStore: {path} must hold experts of one form, got several.")
        tensors = found[0][0]
        return cls(experts, tensors, keep_cached=keep_cached)

    def parts(self, key: Key) -> Parts:
        bank, expert = key
        pieces = self.experts[bank][expert]
        return {n: [self._files[p.file].view(p) for p in parts] for n, parts in pieces.items()}

    def read(self, key: Key, into: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        bank, expert = key
        for name, pieces in self.experts[bank][expert].items():
            row = 0
            for piece in pieces:
                file = self._files[piece.file]
                file.fetch(piece)
                part = file.view(piece)
                # Pages are let go below, so the copy must be done by then.
                copy_parts(into[name][row : row + len(part)], [part])
                row += len(part)
                del part
                file.release(piece, drop=not self.keep_cached)

    def drop_cached(self) -> None:
        """Asks the system to forget the files, so that the next reads are from the disk."""
        for file in self._files.values():
            file.drop(0, 0)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


def _form(expert: Mapping[str, Sequence[Piece]]) -> dict[str, Stored]:
    return {name: Stored(piece.shape, piece.dtype) for name, (piece,) in expert.items()}


class _MappedFile:
    """A file, mapped for reading."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():  # Nothing writes to it.
            warnings.simplefilter("ignore")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def view(self, piece: Piece) -> Tensor:
        data = self._bytes[piece.offset : piece.offset + piece.num_bytes]
        if piece.offset % piece.dtype.itemsize:  # No such view; other writers may not align.
            data = data.clone()
        whole = data.view(piece.dtype).view(piece.shape)
        return whole.transpose(-1, -2) if piece.transposed else whole

    def fetch(self, piece: Piece) -> None:
        """Brings a piece into memory in one call, while other Python threads run."""
        first, size = self._pages(piece)
        if not madvise(first, size, MADV_POPULATE_READ):  # Linux 5.14
            madvise(first, size, MADV_WILLNEED)

    def release(self, piece: Piece, *, drop: bool) -> None:
        """Takes the pages of a piece out of this process's memory."""
        first, size = self._pages(piece)
        madvise(first, size, MADV_DONTNEED)
        if drop:
            self.drop(piece.offset, piece.num_bytes)

    def drop(self, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_DONTNEED)

    def _pages(self, piece: Piece) -> tuple[int, int]:
        """Address and bytes of the whole pages that hold a piece."""
        begin = self._bytes.data_ptr() + piece.offset
        first = begin - begin % mmap.PAGESIZE
        return first, begin + piece.num_bytes - first

    def close(self) -> None:
        del self._bytes
        try:
            self._map.close()
        except BufferError:  # Somebody holds a view; the mapping goes with it.
            pass
        os.close(self._descriptor)


def read_header(path: Path) -> dict[str, Piece]:
    """The tensors of a safetensors file, by their names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that ends too soon.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, _files.MAX_JSON_BYTES):
            raise ValueError(f"{path} must be a safetensors file, got something else.")
        try:
            header = json.loads(file.read(length))
            found = {}
            for name, entry in header.items():
                if name == "__metadata__" or entry["dtype"] not in _DTYPES:
                    continue
                first, last = entry["data_offsets"]
                shape = tuple(map(int, entry["shape"]))
                piece = Piece(path, 8 + length + first, _DTYPES[entry["dtype"]], shape)
                if first < 0 or last - first != piece.num_bytes or 8 + length + last > size:
                    raise ValueError(name)
                found[name] = piece
            return found
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} must be a whole safetensors file, got one that is damaged: {error}."
            ) from error


def _parse(path: Path, key: str) -> tuple[int, int, str]:
    bank, _, rest = key.partition(".")
    expert, _, name = rest.partition(".")
    if not (bank.isdecimal() and expert.isdecimal() and name):
        raise ValueError(f"FileStore: {path} must hold experts alone, got {_files.shown(key)}.")
    return int(bank), int(expert), name


@torch.no_grad()
def write_experts(path: Path | str, banks: Iterable[Parts]) -> None:
    """Writes experts into one safetensors file, each tensor as ``BANK.EXPERT.NAME``.

    The memory of one expert is taken, beside what the banks are in.

    Args:
        banks: as of `MemoryStore`, all of one form.

    Raises:
        OSError: it could not be written; what had the name before is then still there.
        ValueError: banks of several forms.
    """
    path, banks = Path(path), list(banks)
    tensors = forms(banks[0])
    if any(forms(bank) != tensors for bank in banks):
        raise ValueError("write_experts: banks must have one form, got several.")
    order = [
        (b, e, name)
        for b, bank in enumerate(banks)
        for e in range(next(iter(bank.values()))[0].shape[0])
        for name in sorted(tensors, key=lambda n: -tensors[n].dtype.itemsize)
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with _files.writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for b, e, name in order:
            whole = torch.cat([part[e].detach().cpu() for part in banks[b][name]])
            file.write(_buffer(whole))


def _buffer(tensor: Tensor) -> Any:
    assert sys.byteorder == "little"
    tensor = tensor.contiguous()
    array = ctypes.c_char * tensor.nbytes
    return memoryview(array.from_address(tensor.data_ptr())).cast("B") if tensor.nbytes else b""

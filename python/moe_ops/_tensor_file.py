"""Small files of tensors with a checksum over every byte: the safetensors layout, followed by the
SHA-256 of all preceding bytes. They contain no code, and reading them needs no package."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ops import _files, _reading

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_SIZE = 2**62

_DIGEST_BYTES = hashlib.sha256().digest_size


def write_tensors(
    path: Path | str, kind: str, tensors: Mapping[str, Tensor], about: dict[str, Any]
) -> None:
    """Writes a file for `read_tensors` of the same kind.

    Args:
        path: of the file.
        kind: identifies the kind of file: "moe_ops.ExpertPredictor/2".
        tensors: by name, with dtypes of `DTYPES`.
        about: other contents of the file, JSON-serializable.

    Raises:
        OSError: it could not be written.
    """
    parts = safetensors_parts(tensors, {"format": kind, "about": json.dumps(about)})
    content = b"".join(parts)
    _files.write_file(path, content, hashlib.sha256(content).digest())


def safetensors_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes]:
    """Returns the bytes of a safetensors file, header and tensors separately.

    The safetensors library writes metadata in random order; these bytes depend only on the
    arguments.

    Args:
        tensors: by name, with dtypes of `DTYPES`; the widest come first, so that all are aligned.
        metadata: of the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, offset = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        parts.append(bytes_of(tensor))
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]


def mark(tensor: Tensor) -> str:
    """Returns the CRC-32 of a tensor's bytes, eight hexadecimal digits, and its type and shape."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return f"{zlib.crc32(content):08x} {_NAMES.get(tensor.dtype)} {list(tensor.shape)}"


def read_tensors(
    path: Path | str, reader: str, kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and `about` of a file of `write_tensors`.

    Args:
        reader: start of the messages.

    Raises:
        FileNotFoundError, OSError: see `moe_ops._reading.open_regular`.
        ValueError: it is not a regular file, is corrupted, or is of another kind.
    """
    content = _reading.read_bytes(path, reader)
    view = memoryview(content)
    body, checksum = view[:-_DIGEST_BYTES], view[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        raise ValueError(
            f"{reader}: {path} must match its checksum, got one that is damaged or was not written "
            "by this version of moe_ops."
        )
    with _reading.damage(reader, path, f"a file of {kind}"):
        start = 8 + int.from_bytes(body[:8], "little")
        header = json.loads(bytes(body[8:start]))
        metadata = header.pop("__metadata__")
        if metadata["format"] != kind:
            raise ValueError(f"it is of {_files.shown(metadata['format'])}")
        data = bytearray(body[start:])
        tensors = {name: _tensor(data, name, entry) for name, entry in header.items()}
        about = json.loads(metadata["about"])
        if not isinstance(about, dict):
            raise ValueError(f"it says {_files.shown(about)} about itself")
        return tensors, about


def _tensor(data: bytearray, name: str, entry: Mapping[str, Any]) -> Tensor:
    dtype = DTYPES[entry["dtype"]]
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    if not fits(shape, first, last, dtype.itemsize, len(data)):
        raise ValueError(f"{_files.shown(name)} does not fit into it")
    if first == last:
        return torch.empty(shape, dtype=dtype, device="cpu")
    count = (last - first) // dtype.itemsize
    flat = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=first)
    return flat.clone().view(dtype)[:count].reshape(shape)


def fits(shape: Any, first: Any, last: Any, itemsize: int, size: int) -> bool:
    """Returns whether a header's shape and offsets are nonnegative integers, consistent, and within
    `size` bytes of data."""
    numbers = [*shape, first, last]
    if not all(type(number) is int and 0 <= number <= _MAX_SIZE for number in numbers):
        return False
    return last - first == math.prod(shape) * itemsize and last <= size


def bytes_of(tensor: Tensor) -> bytes:
    """Returns the elements of a tensor as bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """Returns the SHA-256, in hexadecimal digits, of tensors with their names, dtypes and shapes,
    and of JSON-serializable values."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()

"""Checkpoints that survive a kill at any moment: one safetensors file, replaced atomically.

A save writes a second file and renames it over the checkpoint, so a reader finds the old file or
the new one and never a mixture. A killed process needs no more than that: what it wrote is in the
page cache. A power cut does: every few seconds the file is also flushed to the disk (fsync) and
kept under a second name, which `load` falls back to when the newest file does not match its
checksum.

The replaced file is not deleted but becomes the next one to write. Overwriting pages that are
already in the page cache is ten times faster than allocating new ones (2 ms against 18 ms for
22 MB), which is what makes a checkpoint after every step affordable.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

FORMAT = "moe_ops.demo/1"
_NAME = "checkpoint.safetensors"
_DURABLE_NAME = "checkpoint.durable.safetensors"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class CheckpointError(RuntimeError):
    """No checkpoint, or none that can be used; the message says what to do."""


@dataclass
class Checkpoint:
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    path: Path
    note: str | None = None


class Checkpointer:
    """Writes and reads the checkpoint of one run in `folder`."""

    def __init__(self, folder: Path, *, fsync_every_s: float = 5.0) -> None:
        self.folder = Path(folder)
        self.path = self.folder / _NAME
        self.durable_path = self.folder / _DURABLE_NAME
        self.fsync_every_s = fsync_every_s
        self._last_fsync = -float("inf")
        self._next = self.folder / f".{_NAME}.next"
        self._replaced = self.folder / f".{_NAME}.replaced"
        self.close()  # Left over from a killed run.

    def exists(self) -> bool:
        return self.path.exists() or self.durable_path.exists()

    def remove(self) -> None:
        for path in (self.path, self.durable_path):
            path.unlink(missing_ok=True)

    def save(
        self,
        tensors: dict[str, torch.Tensor],
        metadata: dict[str, Any],
        *,
        durable: bool | None = None,
    ) -> None:
        """Replace the checkpoint. `durable`: flush to the disk; None does it every few seconds."""
        now = time.monotonic()
        if durable is None:
            durable = now - self._last_fsync >= self.fsync_every_s
        header = {
            "format": FORMAT,
            "checksum": str(_checksum(tensors)),
            "run": json.dumps(metadata, sort_keys=True),
        }
        write_safetensors(self._next, tensors, header)
        if durable:
            _fsync(self._next)
            _link(self._next, self.durable_path)
            self._last_fsync = now
        replaced = _link(self.path, self._replaced)
        os.replace(self._next, self.path)
        if replaced:
            # A file that has a second name is the durable copy: it must stay as it is.
            if self._replaced.stat().st_nlink == 1:
                os.replace(self._replaced, self._next)
            else:
                self._replaced.unlink()
        if durable:
            _fsync(self.folder)

    def close(self) -> None:
        """Remove the working files."""
        for path in (self._next, self._replaced, self.durable_path):
            _temporary(path).unlink(missing_ok=True)
        for path in (self._next, self._replaced):
            path.unlink(missing_ok=True)

    def load(self) -> Checkpoint:
        """The newest checkpoint that is whole.

        Errors: CheckpointError when there is none, with a sentence that says what to do.
        """
        if not self.exists():
            raise CheckpointError(
                f"demo: --resume needs a checkpoint, got none in {self.folder}; "
                "run without --resume to start one"
            )
        problems = []
        for path in (self.path, self.durable_path):
            if not path.exists():
                continue
            try:
                checkpoint = _read(path)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                problems.append(f"{path.name} is damaged ({error})")
                continue
            if problems:
                step = checkpoint.metadata["step"]
                checkpoint.note = f"{problems[0]}; continuing from {path.name}, step {step}"
            return checkpoint
        raise CheckpointError(
            f"demo: no usable checkpoint in {self.folder}: {'; '.join(problems)}; "
            "run with --overwrite to start again"
        )


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {header.get('format')}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if str(_checksum(tensors)) != header["checksum"]:
        raise ValueError("its contents do not match its checksum")
    return Checkpoint(tensors=tensors, metadata=json.loads(header["run"]), path=path)


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file over `path`, in place where it exists.

    safetensors.torch.save_file always makes a new file, and orders the metadata by chance; this
    one gives the same bytes for the same input.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    arrays = [_bytes_of(tensors[name]) for name in order]
    layout: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in zip(order, arrays, strict=True):
        tensor = tensors[name]
        layout[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + array.size],
        }
        end += array.size
    header = json.dumps(layout).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:
        parts: list[Any] = [len(header).to_bytes(8, "little"), header, *arrays]
        for part in parts:
            view = memoryview(part)
            while view.nbytes:
                view = view[file.write(view) :]
        file.truncate()


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    """Sum of all 64-bit words modulo 2^64, weighted by the tensor's place in the sorted names.

    Ten times faster than a CRC, and all it has to notice is a torn or flipped file.
    """
    total = 0
    for place, name in enumerate(sorted(tensors)):
        data = _bytes_of(tensors[name])
        whole = data.size // 8 * 8
        words = int(np.add.reduce(data[:whole].view(np.uint64), dtype=np.uint64))
        tail = int.from_bytes(data[whole:].tobytes(), "little")
        total += (words + tail) * (2 * place + 1)
    return total % 2**64


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.tmp")


def _link(existing: Path, new: Path) -> bool:
    """Give a file a second name, replacing what had it; False where that is impossible."""
    temporary = _temporary(new)
    temporary.unlink(missing_ok=True)
    try:
        os.link(existing, temporary)
    except OSError:
        return False  # `existing` is missing, or the file system has no hard links.
    os.replace(temporary, new)
    return True


def _fsync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # Some systems cannot open a folder.
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)

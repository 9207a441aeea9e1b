"""Checkpoints that survive a kill at any moment: one safetensors file, replaced atomically.

A save writes a temporary file beside the checkpoint and renames it over the old one, so a reader
finds the old file or the new one and never a mixture. A killed process needs no more than that:
what it wrote is in the page cache. A power cut does: every few seconds the file is also flushed to
the disk (fsync) and kept under a second name, which `load` falls back to when the newest file does
not match its checksum.
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
from safetensors.torch import save_file

FORMAT = "moe_ops.demo/1"
_NAME = "checkpoint.safetensors"
_DURABLE_NAME = "checkpoint.durable.safetensors"


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
        temporary = self.folder / f".{_NAME}.tmp"
        save_file(tensors, temporary, metadata=header)
        if durable:
            _fsync(temporary)
            # A hard link costs no second write. The name may be left over from a killed save.
            link = self.folder / f".{_DURABLE_NAME}.tmp"
            link.unlink(missing_ok=True)
            try:
                os.link(temporary, link)
                os.replace(link, self.durable_path)
            except OSError:
                pass  # A file system without hard links keeps the one name.
            self._last_fsync = now
        os.replace(temporary, self.path)
        if durable:
            _fsync(self.folder)

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
                checkpoint.note = (
                    f"{problems[0]}; continuing from {path.name}, step {checkpoint.metadata['step']}"
                )
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
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if str(_checksum(tensors)) != header["checksum"]:
        raise ValueError("its contents do not match its checksum")
    return Checkpoint(tensors=tensors, metadata=json.loads(header["run"]), path=path)


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    """Sum of all 64-bit words modulo 2^64, weighted by the tensor's place in the sorted names.

    Ten times faster than a CRC, and all it has to notice is a torn or flipped file.
    """
    total = 0
    for place, name in enumerate(sorted(tensors)):
        data = tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy()
        whole = data.size // 8 * 8
        words = int(np.add.reduce(data[:whole].view(np.uint64), dtype=np.uint64))
        tail = int.from_bytes(data[whole:].tobytes(), "little")
        total += (words + tail) * (2 * place + 1)
    return total % 2**64


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

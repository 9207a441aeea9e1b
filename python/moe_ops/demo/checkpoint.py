"""Checkpoints that survive a kill and a power cut at any moment: one safetensors file of each.

A save writes a new file, flushes it to the disk and renames it over the checkpoint (see
`moe_ops._files`); the one before is kept under a second name. The header has the SHA-256 of
everything that the file says: a file in which any bit has changed is refused, and `load` takes the
one before.

A save costs more than a step of a small model, so `due` spreads them: they take a twentieth of the
time, which makes them about a second apart in the demo.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from moe_ops import _files, _reading

FORMAT = "moe_ops.demo/3"
_NAME = "checkpoint.safetensors"
_PREVIOUS_NAME = "checkpoint.previous.safetensors"
# The only key of the header's metadata: safetensors writes several in an order of chance.
_METADATA = "moe_ops.demo"
_UNREADABLE = (
    *(SafetensorError, UnicodeDecodeError, json.JSONDecodeError, RecursionError),
    *(LookupError, TypeError, AttributeError, OverflowError),
)


class CheckpointError(RuntimeError):
    """No checkpoint, or none that can be used; the message says what to do."""


@dataclass
class Checkpoint:
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    path: Path
    note: str | None = None


class Checkpointer:
    """Writes and reads the checkpoint of one run in `folder`.

    Args:
        share: of the time that saves may take when they are made whenever one is `due`.
    """

    def __init__(self, folder: Path, *, share: float = 0.05) -> None:
        self.folder = Path(folder)
        self.path = self.folder / _NAME
        self.previous_path = self.folder / _PREVIOUS_NAME
        self.share = share
        self._next = -float("inf")
        self._damaged = False

    def exists(self) -> bool:
        return self.path.exists() or self.previous_path.exists()

    def remove(self) -> None:
        for path in (self.path, self.previous_path):
            with _files.sentence(path):
                path.unlink(missing_ok=True)

    @property
    def due(self) -> bool:
        """Whether a save now keeps within the share of the time."""
        return time.monotonic() >= self._next

    def save(self, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        """Replace the checkpoint; what was there becomes the one before.

        Raises:
            OSError: it could not be written; the checkpoint of before is still there.
        """
        started = time.monotonic()
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        about = {"format": FORMAT, "run": metadata, "sha256": _digest(tensors, metadata)}
        content = safetensors.torch.save(tensors, {_METADATA: json.dumps(about, sort_keys=True)})
        with _files.Replacement(self.folder) as files:
            files.add(_NAME, content)
            if not self._damaged:
                files.keep(_NAME, _PREVIOUS_NAME)
        self._damaged = False
        ended = time.monotonic()
        self._next = ended + (ended - started) * (1 / self.share - 1)

    def load(self) -> Checkpoint:
        """The newest checkpoint that is whole.

        Raises:
            CheckpointError: there is none, with a sentence that says what to do.
        """
        problems = []
        for path in (self.path, self.previous_path):
            try:
                checkpoint = _read(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                problems.append(f"{path.name} cannot be read ({error.strerror})")
                continue
            except ValueError as error:
                problems.append(f"{path.name} {error}")
                continue
            # The next save must not put a damaged file in the place of the one before.
            self._damaged = bool(problems)
            if problems:
                checkpoint.note = (
                    f"{problems[0]}; continuing from {path.name}, step "
                    f"{checkpoint.metadata['step']}"
                )
            return checkpoint
        if problems:
            raise CheckpointError(
                f"demo: no usable checkpoint in {self.folder}: {'; '.join(problems)}; "
                "run with --overwrite to start again"
            )
        raise CheckpointError(
            f"demo: --resume needs a checkpoint, got none in {self.folder}; "
            "run without --resume to start one"
        )


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Checkpoint:
    """The checkpoint in a file. ValueError, to stand behind the file's name, if it is damaged."""
    try:
        data = _reading.read_bytes(path, "")  # As it was, whatever takes its name meanwhile.
    except ValueError:
        raise ValueError("must be a regular file, got something else") from None
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"][_METADATA])
        if about["format"] != FORMAT:
            raise ValueError(
                f"must be a checkpoint of this version of moe_ops ({FORMAT}), "
                f"got {_files.shown(about['format'])}"
            )
        tensors, run = safetensors.torch.load(data), about["run"]
        whole = _digest(tensors, run) == about["sha256"]
    except _UNREADABLE:
        whole = False
    if not whole:
        raise ValueError("is damaged: its contents do not match its checksum")
    return Checkpoint(tensors=tensors, metadata=run, path=path)

"""Checkpoints that survive a kill and a power cut at any moment: one safetensors file of each.

A save writes a new file, flushes it to the disk and renames it over the checkpoint (see
`moe_ops._files`); the one before is kept under a second name. The last 32 bytes of a file, those of
a tensor called "~sha256", are the SHA-256 of all that is before them, header included: a file in
which any bit has changed is refused, and `load` takes the one before.

A save costs more than a step of a small model, so `due` spreads them: they take a twentieth of the
time, which makes them about a second apart in the demo.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from moe_ops import _files

FORMAT = "moe_ops.demo/2"
DIGEST = "~sha256"
_NAME = "checkpoint.safetensors"
_PREVIOUS_NAME = "checkpoint.previous.safetensors"
# The only key of the header's metadata: safetensors writes several in an order of chance.
_METADATA = "moe_ops.demo"
_DURABLE_NAME = "checkpoint.durable.safetensors"  # Of earlier versions.


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
        for name in (_NAME, _PREVIOUS_NAME, _DURABLE_NAME):
            path = self.folder / name
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise _files.WriteError(path, error) from error

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
        body, digest = _files.sealed(_serialized(tensors, metadata))
        with _files.Replacement(self.folder) as files:
            files.add(_NAME, body, digest)
            if not self._damaged:
                files.keep(_NAME, _PREVIOUS_NAME)
        self._damaged = False
        ended = time.monotonic()
        self._next = ended + (ended - started) * (1 / self.share - 1)

    def load(self) -> Checkpoint:
        """The newest checkpoint that is whole.

        Errors: CheckpointError when there is none, with a sentence that says what to do.
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


def _serialized(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> memoryview:
    """A safetensors file without its last bytes, those of the digest."""
    if DIGEST in tensors:
        raise ValueError(f"save: tensors must not have the name {DIGEST}, got one that has")
    values = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    values[DIGEST] = torch.zeros(_files.DIGEST_BYTES, dtype=torch.uint8)
    header = {_METADATA: json.dumps({"format": FORMAT, "run": metadata}, sort_keys=True)}
    data = memoryview(safetensors.torch.save(values, header))
    layout, start = _header(data)
    if start + layout[DIGEST]["data_offsets"][1] != len(data):
        # safetensors puts wide types first, then goes by name.
        raise ValueError("save: tensors must be wider than a bool and named in ASCII letters")
    return data[: -_files.DIGEST_BYTES]


def _header(data: memoryview) -> tuple[dict[str, Any], int]:
    """The JSON in front of a safetensors file, and where its tensors begin."""
    start = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(bytes(data[8:start]))
    return header, start


def _read(path: Path) -> Checkpoint:
    if path.exists() and not path.is_file():
        raise ValueError("must be a file, got something else")
    data = path.read_bytes()  # One file as it was, whatever takes its name meanwhile.
    if _files.unsealed(data) is None:
        raise ValueError(
            "is damaged (its contents do not match its checksum) or was written by an earlier "
            "version of moe_ops"
        )
    try:
        header, _ = _header(memoryview(data))
        found = json.loads(header["__metadata__"][_METADATA])
        if found["format"] != FORMAT:
            raise ValueError(f"must have the format {FORMAT}, got {_files.shown(found['format'])}")
        tensors = safetensors.torch.load(data)
        step, run = found["run"]["step"], found["run"]
    except (SafetensorError, LookupError, TypeError) as error:
        raise ValueError(f"is not a checkpoint of the demo ({error})") from error
    if not isinstance(step, int):
        raise ValueError(f"must have a whole number of steps, got {_files.shown(step)}")
    del tensors[DIGEST]
    return Checkpoint(tensors=tensors, metadata=run, path=path)

"""Recorded routes of a model, for policies and for training predictors.

Letters: B sequences, S tokens per sequence, N tokens of all steps, L calls of experts per step, K
experts per token.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from moe_ops import _files, _reading
from moe_ops.expert_weights import ExpertInputs
from moe_ops.quant.bank import find_banks

_NAMES = ("ids", "tokens", "steps", "banks", "num_experts")
# Maximum compression ratio of deflate; a zip file that claims more is rejected.
_MOST_INFLATED = 1032


@dataclass
class ExpertTrace:
    """Experts of each token in each step.

    A step is one forward of the model.

    Attributes:
        ids: [N, L, K] int16, -1 for empty slots.
        tokens: [N] int64, the model's inputs; -1 if unknown.
        steps: [number of steps, 2]: B and S of each; their products sum to N.
        banks: [L], the index of the layer of each call, in the order of the model's layers of
            experts.
        num_experts: E.
    """

    ids: Tensor
    tokens: Tensor
    steps: Tensor
    banks: list[int]
    num_experts: int

    def by_step(self) -> Iterator[Tensor]:
        """Yields ids [B * S, L, K] of each step."""
        yield from self.ids.split(self.steps.prod(1).tolist())

    def calls(self) -> list[tuple[int, list[int]]]:
        """Returns the layer and used experts of every call, in order."""
        found = []
        for ids in self.by_step():
            for position, bank in enumerate(self.banks):
                used = ids[:, position].unique().tolist()
                found.append((bank, [e for e in used if 0 <= e < self.num_experts]))
        return found

    def multi_hot(self) -> Tensor:
        """Returns [N, L, E] bool: True if a token uses an expert in a call."""
        ids = self.ids.long()
        shape = (*ids.shape[:2], self.num_experts + 1)
        hot = torch.zeros(shape, dtype=torch.bool, device=ids.device)
        empty = (ids < 0) | (ids >= self.num_experts)
        return hot.scatter_(2, ids.masked_fill(empty, self.num_experts), True)[..., :-1]

    def sequences(self) -> list[Tensor]:
        """Returns the positions in [0, N) of the tokens of each sequence. A step with one token per
        sequence continues the sequences of the step before if their number is equal; other steps
        start new ones."""
        found: list[list[Tensor]] = []
        open_ones: list[list[Tensor]] = []
        first = 0
        for batch, length in self.steps.tolist():
            rows = torch.arange(first, first + batch * length, device="cpu").view(batch, length)
            if length > 1 or len(open_ones) != batch:
                open_ones = [[] for _ in range(batch)]
                found += open_ones
            for sequence, row in zip(open_ones, rows, strict=True):
                sequence.append(row)
            first += batch * length
        return [torch.cat(pieces) for pieces in found]

    def save(self, path: Path | str) -> None:
        """Writes an npz file, with a checksum of its arrays.

        Raises:
            OSError: it could not be written.
        """
        arrays: dict[str, Any] = {
            "ids": self.ids.numpy(),
            "tokens": self.tokens.numpy(),
            "steps": self.steps.numpy(),
            "banks": np.asarray(self.banks, dtype=np.int64),
            "num_experts": np.asarray(self.num_experts),
        }
        with _files.writing(Path(path)) as file:
            np.savez_compressed(file, **arrays, sha256=np.asarray(_digest(arrays)))

    @classmethod
    def load(cls, path: Path | str) -> ExpertTrace:
        """Reads a file of `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not a regular file, contains something else, or does not match its
                checksum, which files of earlier versions do not have.
        """
        reader = "ExpertTrace.load"
        with (
            _reading.open_regular(path, reader) as file,
            _reading.damage(reader, path, "a saved trace"),
        ):
            arrays = _arrays(file)
            said = arrays.pop("sha256", None)
            if said is not None and str(said) != _digest(arrays):
                raise ValueError("its arrays do not match its checksum")
            for name in _NAMES:
                if arrays[name].dtype.kind != "i":
                    raise ValueError(f"{name} is of {arrays[name].dtype}")
            ids, tokens, steps = (torch.from_numpy(arrays[n]) for n in ("ids", "tokens", "steps"))
            banks, num_experts = arrays["banks"].tolist(), int(arrays["num_experts"])
            fits = ids.dim() == 3 and tokens.dim() == 1 and steps.dim() == 2 and steps.shape[1] == 2
            fits = fits and arrays["banks"].shape == ids.shape[1:2] and num_experts > 0
            fits = fits and bool(((steps >= 0) & (steps <= max(len(tokens), 1))).all())
            if not fits or not len(ids) == len(tokens) == int(steps.prod(1).sum()):
                raise ValueError("it holds no [N, L, K] ids of its steps' tokens")
        return cls(ids, tokens, steps, banks, num_experts)


def _arrays(file: BinaryIO) -> dict[str, Any]:
    """Returns the arrays of an npz file, whose sizes are checked against the file before memory is
    allocated. Errors are those of zipfile, zlib and NumPy."""
    size = os.fstat(file.fileno()).st_size
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        there = {info.filename: info for info in archive.infolist()}
        for name in (*_NAMES, "sha256"):
            entry = there.get(f"{name}.npy")
            if entry is None:
                if name == "sha256":
                    continue
                raise ValueError(f"it holds no {name}")
            plain = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            most = _MOST_INFLATED * entry.compress_size + 1024
            if not plain or entry.compress_size > size or entry.file_size > most:
                raise ValueError(f"{name} cannot have {entry.file_size} bytes in {size}")
            arrays[name] = _array(archive.read(entry))
    return arrays


def _array(content: bytes) -> Any:
    """Returns the array of an npy file, copied only after its size has been checked."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its arrays are of version {version}")
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    start = stream.tell()
    sizes_fit = all(type(n) is int and n >= 0 for n in shape) and not dtype.hasobject
    if not sizes_fit or math.prod(shape) * dtype.itemsize != len(content) - start:
        raise ValueError(f"an array of {dtype} {list(shape)} has {len(content) - start} bytes")
    flat = np.frombuffer(content, dtype, math.prod(shape), start)
    return flat.reshape(shape, order="F" if by_columns else "C").copy()


def _digest(arrays: Mapping[str, Any]) -> str:
    found = hashlib.sha256()
    for name in _NAMES:
        array = arrays[name]
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


class TraceRecorder:
    """Collects a trace, which `trace()` returns."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._steps: list[tuple[int, int]] = []
        self._tokens: list[Tensor] = []
        self._ids: list[list[Tensor]] = []
        self._banks: list[list[int]] = []

    def begin(self, tokens: Tensor | None) -> None:
        """Starts a step."""
        self._steps.append((0, 0) if tokens is None else (tokens.shape[0], tokens.shape[1]))
        self._tokens.append(
            torch.empty(0, device="cpu") if tokens is None else tokens.detach().cpu().flatten()
        )
        self._ids.append([])
        self._banks.append([])

    def add(self, bank: int, topk_ids: Tensor) -> None:
        """Adds a call of a layer, [B * S, K]."""
        if not self._ids:
            self.begin(None)
        self._ids[-1].append(topk_ids.detach().cpu().to(torch.int16))
        self._banks[-1].append(bank)

    def trace(self) -> ExpertTrace:
        """Returns the recorded trace.

        Raises:
            ValueError: nothing was recorded, or steps called different layers or in different
                orders.
        """
        kept = [i for i, calls in enumerate(self._ids) if calls]
        if not kept:
            raise ValueError("TraceRecorder: the model must have run, got no call of its experts.")
        banks = self._banks[kept[0]]
        if any(self._banks[i] != banks for i in kept):
            raise ValueError(
                "TraceRecorder: steps must call the same banks in one order, got several orders."
            )
        width = max(ids.shape[1] for i in kept for ids in self._ids[i])
        steps, tokens, rows = [], [], []
        for i in kept:
            padded = [
                nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in self._ids[i]
            ]
            rows.append(torch.stack(padded, 1))
            num = len(rows[-1])
            known = self._steps[i][0] * self._steps[i][1] == num
            steps.append(self._steps[i] if known else (1, num))
            tokens.append(self._tokens[i].long() if known else torch.full((num,), -1, device="cpu"))
        return ExpertTrace(
            torch.cat(rows),
            torch.cat(tokens),
            torch.tensor(steps, device="cpu"),
            list(banks),
            self.num_experts,
        )


@contextlib.contextmanager
def record_expert_trace(model: nn.Module, *, skip: Sequence[str] = ()) -> Iterator[TraceRecorder]:
    """Records the routes of a model while the context is open; `recorder.trace()` returns them.

    Example:
        with record_expert_trace(model) as recorder:
            model.generate(prompts, 64)
        recorder.trace().save("routes.npz")

    Args:
        model: of this package or of transformers, its experts offloaded or not.
        skip: shell patterns of the names of experts' modules to exclude.

    Raises:
        ValueError: no experts, or layers with different numbers of experts.
    """
    banks = list(_calls_of(model, tuple(skip)))
    sizes = sorted({num_experts for _, num_experts, _ in banks})
    if len(sizes) != 1:
        raise ValueError(
            "record_expert_trace: model must hold banks of one number of experts, got "
            f"{sizes or 'none'}."
        )
    recorder = TraceRecorder(sizes[0])
    handles = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs: recorder.begin(tokens_of(args, kwargs)), with_kwargs=True
        )
    ]
    for number, (module, _, inputs_of) in enumerate(banks):

        def note(
            module: nn.Module, args: Any, kwargs: Any, number: int = number, of: Any = inputs_of
        ) -> None:
            recorder.add(number, of(module, args, kwargs).topk_ids)

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _calls_of(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[nn.Module, int, Any]]:
    """Yields each module of experts, its E, and a function that reads the inputs of its calls."""
    stored = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "cache") and hasattr(module, "bank_number")
    }
    for module in stored.values():
        yield module, module.num_experts, plain_inputs
    if not stored:
        for found in find_banks(model, skip, op="record_expert_trace"):
            yield found.module, found.bank.num_experts, found.hook.inputs


def plain_inputs(module: nn.Module, args: Any, kwargs: Any) -> ExpertInputs:
    """Returns the inputs of a call of `Experts` or of a replacement."""
    names = ("x", "topk_weights", "topk_ids")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return ExpertInputs(*(given[name] for name in names))


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the token ids [B, S] in a call of a language model, or None if there are none."""
    found = kwargs.get("input_ids", kwargs.get("tokens", args[0] if args else None))
    if isinstance(found, Tensor) and found.dim() == 2 and not found.is_floating_point():
        return found
    return None

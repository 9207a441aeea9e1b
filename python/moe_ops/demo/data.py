"""Text for the demo: a corpus of bytes, split by file into training and held-out text."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# The standard library's own tests are larger than the library and much more repetitive.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_MAX_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes (uint8, 1-D), their source, and their hash."""

    train: Tensor
    heldout: Tensor
    source: str
    sha256: str


def load_corpus(path: Path | str | None = None, *, heldout_fraction: float = 0.1) -> Corpus:
    """Reads the corpus.

    Without `path`: the ``*.py`` files of the running Python's standard library, without its test
    folders and installed packages. A folder: every text file below it. A file: the file, with its
    tail held out. Files are held out in the order of a hash of their relative path until
    `heldout_fraction` of the bytes is reached: the split depends only on the files.

    Raises:
        ValueError: no text was found.
        FileNotFoundError: the path does not exist.
    """
    root = Path(sysconfig.get_path("stdlib") if path is None else path)
    if root.is_dir():
        skipped = _SKIPPED if path is None else {"__pycache__", ".git"}
        files = _read_folder(root, "*.py" if path is None else "*", skipped)
    elif root.is_file():
        with open(root, "rb") as file:
            files = {root.name: file.read(_MAX_BYTES)}
    else:
        raise FileNotFoundError(f"demo: --data must be a file or a folder, got {root}")
    if not files:
        raise ValueError(f"demo: --data must hold text files, got none in {root}")
    if len(files) == 1:
        (text,) = files.values()
        cut = len(text) - int(len(text) * heldout_fraction)
        train, heldout = text[:cut], text[cut:]
    else:
        chosen = _choose_heldout(files, heldout_fraction)
        train = b"".join(files[name] for name in sorted(files.keys() - chosen))
        heldout = b"".join(files[name] for name in sorted(chosen))
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + train + heldout).hexdigest()
    as_bytes = [torch.from_numpy(np.frombuffer(p, np.uint8).copy()) for p in (train, heldout)]
    return Corpus(as_bytes[0], as_bytes[1], str(root), digest)


def training_batch(
    text: Tensor, *, seed: int, step: int, batch_size: int, context: int
) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets, int64 [batch_size, context], of one step.

    The result depends only on the text, the seed and the step: a resumed run reads the bytes that
    an uninterrupted run reads, and no data order has to be saved.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = torch.from_numpy(rng.integers(0, text.numel() - context, size=batch_size))
    return _windows(text, starts, context)


def heldout_windows(text: Tensor, *, count: int, context: int) -> tuple[Tensor, Tensor]:
    """Returns `count` windows evenly spread over the held-out text (fewer if it is short)."""
    count = max(1, min(count, (text.numel() - 1) // context))
    starts = torch.linspace(0, text.numel() - context - 1, count, dtype=torch.float64).long()
    return _windows(text, starts, context)


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    block = text[starts[:, None] + torch.arange(context + 1)].long()
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def _read_folder(root: Path, pattern: str, skipped: set[str]) -> dict[str, bytes]:
    """Reads the text files below a folder, up to a limit, skipping unreadable files."""
    files: dict[str, bytes] = {}
    left = _MAX_BYTES
    for file in sorted(root.rglob(pattern)):
        relative = file.relative_to(root)
        if skipped.intersection(relative.parts) or not file.is_file():
            continue
        try:
            with open(file, "rb") as opened:
                text = opened.read(left + 1)
        except OSError:
            continue
        if not text or b"\0" in text[:4096]:
            continue
        if len(text) > left:
            break
        files[relative.as_posix()] = text
        left -= len(text)
    return files


def _choose_heldout(files: dict[str, bytes], fraction: float) -> set[str]:
    wanted = fraction * sum(len(text) for text in files.values())
    chosen: set[str] = set()
    size = 0
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    for name in order[:-1]:
        if size >= wanted:
            break
        # One huge file must not displace the other training text.
        if not chosen or size + len(files[name]) <= 2 * wanted:
            chosen.add(name)
            size += len(files[name])
    return chosen

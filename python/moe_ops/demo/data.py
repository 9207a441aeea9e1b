"""Text for the demo: a corpus of bytes, split by file, and the entropy of simple models of it."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# The standard library's own tests are larger than the library and much more repetitive.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_MAX_BYTES = 128 * 2**20
# Added to every count, so that a byte or a pair that the training text lacks costs about
# log2(count / 0.01) bits instead of infinitely many.
_SMOOTHING = 0.01


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes (uint8, 1-D) with what is known about them."""

    train: torch.Tensor
    heldout: torch.Tensor
    source: str
    num_train_files: int
    num_heldout_files: int
    sha256: str

    def summary(self) -> dict[str, object]:
        return {
            "source": self.source,
            "train_bytes": self.train.numel(),
            "heldout_bytes": self.heldout.numel(),
            "train_files": self.num_train_files,
            "heldout_files": self.num_heldout_files,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class Entropies:
    """Cross-entropy of the held-out bytes, bits per byte, under counts of the training bytes.

    unigram: ``-mean log2 p(b)`` with ``p(b) = (count(b) + 0.01) / (n + 2.56)``.
    bigram: ``-mean log2 p(b | a)``, ``a`` the byte before, with
    ``p(b | a) = (count(ab) + 0.01) / (count(a) + 2.56)``.
    """

    unigram: float
    bigram: float


def load_corpus(path: Path | str | None = None, *, heldout_fraction: float = 0.1) -> Corpus:
    """Read the corpus.

    Without `path`: the ``*.py`` files of the running Python's standard library, without its test
    folders and installed packages. A folder: every text file below it. A file: that file, whose
    tail is held out. Files are held out in the order of a hash of their relative path until
    `heldout_fraction` of the bytes is reached: the split depends on nothing but the files.

    Errors: ValueError when there is no text or too little of it, FileNotFoundError for a missing
    path.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = _read_folder(root, pattern="*.py", skip=_SKIPPED_FOLDERS)
        source = f"Python standard library source, {root}"
    else:
        root = Path(path)
        if not root.is_file() and not root.is_dir():
            raise FileNotFoundError(f"demo: --data must be a file or a folder, got {root}")
        if root.is_dir():
            files = _read_folder(root, pattern="*", skip={"__pycache__", ".git"})
        else:
            with open(root, "rb") as file:
                files = {root.name: file.read(_MAX_BYTES)}
        source = str(root)
    if not files:
        raise ValueError(f"demo: --data must hold text files, got none in {root}")

    if len(files) == 1:
        (text,) = files.values()
        cut = len(text) - int(len(text) * heldout_fraction)
        train, heldout, num_files, num_heldout = text[:cut], text[cut:], 1, 1
    else:
        heldout_names = _choose_heldout(files, heldout_fraction)
        train = b"".join(files[name] for name in sorted(files) if name not in heldout_names)
        heldout = b"".join(files[name] for name in sorted(heldout_names))
        num_files, num_heldout = len(files) - len(heldout_names), len(heldout_names)
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + train + heldout).hexdigest()
    return Corpus(
        train=_to_tensor(train),
        heldout=_to_tensor(heldout),
        source=source,
        num_train_files=num_files,
        num_heldout_files=num_heldout,
        sha256=digest,
    )


def entropies(corpus: Corpus) -> Entropies:
    """The yardsticks: what a byte costs without context and with one byte of it."""
    train = corpus.train.numpy()
    heldout = corpus.heldout.numpy()
    unigram = np.bincount(train, minlength=256) + _SMOOTHING
    log_unigram = np.log2(unigram / unigram.sum())

    def pairs(text: np.ndarray) -> np.ndarray:
        index = text[:-1].astype(np.int64) * 256 + text[1:]
        return np.bincount(index, minlength=256 * 256).reshape(256, 256)

    bigram = pairs(train) + _SMOOTHING
    log_bigram = np.log2(bigram / bigram.sum(axis=1, keepdims=True))
    heldout_pairs = pairs(heldout)
    return Entropies(
        unigram=float(-log_unigram[heldout].mean()),
        bigram=float(-(heldout_pairs * log_bigram).sum() / heldout_pairs.sum()),
    )


def training_batch(
    text: torch.Tensor, *, seed: int, step: int, batch_size: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [batch_size, context], of one step.

    A pure function of the text, the seed and the step: a resumed run sees the bytes that an
    uninterrupted one sees, and nothing about the data order has to be saved.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = torch.from_numpy(rng.integers(0, text.numel() - context, size=batch_size))
    return windows(text, starts, context)


def heldout_windows(
    text: torch.Tensor, *, count: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` windows evenly spread over the held-out text (fewer when it is short)."""
    count = max(1, min(count, (text.numel() - 1) // context))
    starts = torch.linspace(0, text.numel() - context - 1, count, dtype=torch.float64).long()
    return windows(text, starts, context)


def windows(
    text: torch.Tensor, starts: torch.Tensor, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    index = starts[:, None] + torch.arange(context + 1)
    block = text[index].long()
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def check_size(corpus: Corpus, context: int) -> None:
    """Raise ValueError when a window does not fit in either half."""
    for name, text in (("training", corpus.train), ("held-out", corpus.heldout)):
        if text.numel() < context + 2:
            raise ValueError(
                f"demo: the {name} text must have at least {context + 2} bytes, "
                f"got {text.numel()} from {corpus.source}"
            )


def _read_folder(root: Path, *, pattern: str, skip: set[str]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    total = 0
    for file in sorted(root.rglob(pattern)):
        relative = file.relative_to(root)
        if skip.intersection(relative.parts) or not file.is_file():
            continue
        try:
            with open(file, "rb") as opened:
                start = opened.read(4096)
                if not start or b"\0" in start:
                    continue
                text = start + opened.read(_MAX_BYTES - total)
        except OSError:
            continue
        if total + len(text) > _MAX_BYTES:
            break
        files[relative.as_posix()] = text
        total += len(text)
    return files


def _choose_heldout(files: dict[str, bytes], fraction: float) -> set[str]:
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    wanted = fraction * sum(len(text) for text in files.values())
    chosen: set[str] = set()
    size = 0
    for name in order[:-1]:
        if size >= wanted:
            break
        # One huge file must not swallow the training text.
        if chosen and size + len(files[name]) > 2 * wanted:
            continue
        chosen.add(name)
        size += len(files[name])
    return chosen


def _to_tensor(text: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())

"""Text for the demo: a corpus of bytes, split by file, and the entropy of simple models of it."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# The standard library's own tests are larger than the library and much more repetitive.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
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


def load_corpus(path: Path | str | None = None, *, heldout_fraction: float = 0.1) -> Corpus:
    """Read the corpus.

    Without `path`: the ``*.py`` files of the running Python's standard library, without its test
    folders and installed packages. A folder: every text file below it. A file: that file, whose
    tail is held out. Files are held out in the order of a hash of their relative path until
    `heldout_fraction` of the bytes is reached: the split depends on nothing but the files.

    Raises:
        ValueError: there is no text.
        FileNotFoundError: there is no such path.
    """
    root = Path(sysconfig.get_path("stdlib") if path is None else path)
    if root.is_dir():
        skipped = _SKIPPED if path is None else {"__pycache__", ".git"}
        files = _read_folder(root, pattern="*.py" if path is None else "*", skipped=skipped)
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
        train, heldout, num_files, num_heldout = text[:cut], text[cut:], 1, 1
    else:
        chosen = _choose_heldout(files, heldout_fraction)
        train = b"".join(files[name] for name in sorted(files.keys() - chosen))
        heldout = b"".join(files[name] for name in sorted(chosen))
        num_files, num_heldout = len(files) - len(chosen), len(chosen)
    return Corpus(
        train=_to_tensor(train),
        heldout=_to_tensor(heldout),
        source=f"Python standard library source, {root}" if path is None else str(root),
        num_train_files=num_files,
        num_heldout_files=num_heldout,
        sha256=hashlib.sha256(len(train).to_bytes(8, "little") + train + heldout).hexdigest(),
    )


def entropies(corpus: Corpus) -> dict[str, float]:
    """Cross-entropy of the held-out bytes, bits a byte, under counts of the training bytes.

    unigram: ``-mean log2 p(b)`` with ``p(b) = (count(b) + 0.01) / (n + 2.56)``.
    bigram: ``-mean log2 p(b | a)``, ``a`` the byte before, with
    ``p(b | a) = (count(ab) + 0.01) / (count(a) + 2.56)``.
    """
    train, heldout = corpus.train.numpy(), corpus.heldout.numpy()
    unigram = np.bincount(train, minlength=256) + _SMOOTHING

    def pairs(text: np.ndarray) -> np.ndarray:
        index = text[:-1].astype(np.int64) * 256 + text[1:]
        return np.bincount(index, minlength=256 * 256).reshape(256, 256)

    bigram, seen = pairs(train) + _SMOOTHING, pairs(heldout)
    log_bigram = np.log2(bigram / bigram.sum(axis=1, keepdims=True))
    return {
        "unigram": float(-np.log2(unigram / unigram.sum())[heldout].mean()),
        "bigram": float(-(seen * log_bigram).sum() / seen.sum()),
    }


def training_batch(
    text: torch.Tensor, *, seed: int, step: int, batch_size: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [batch_size, context], of one step.

    A pure function of the text, the seed and the step: a resumed run sees the bytes that an
    uninterrupted one sees, and nothing about the data order has to be saved.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = torch.from_numpy(rng.integers(0, text.numel() - context, size=batch_size))
    return _windows(text, starts, context)


def heldout_windows(
    text: torch.Tensor, *, count: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` windows evenly spread over the held-out text (fewer when it is short)."""
    count = max(1, min(count, (text.numel() - 1) // context))
    starts = torch.linspace(0, text.numel() - context - 1, count, dtype=torch.float64).long()
    return _windows(text, starts, context)


def check_size(corpus: Corpus, context: int) -> None:
    """Raise ValueError when a window does not fit in either half."""
    for name, text in (("training", corpus.train), ("held-out", corpus.heldout)):
        if text.numel() < context + 2:
            raise ValueError(
                f"demo: the {name} text must have at least {context + 2} bytes, "
                f"got {text.numel()} from {corpus.source}"
            )


def _windows(
    text: torch.Tensor, starts: torch.Tensor, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    block = text[starts[:, None] + torch.arange(context + 1)].long()
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def _read_folder(root: Path, *, pattern: str, skipped: set[str]) -> dict[str, bytes]:
    """The text files below a folder, up to a limit; those that cannot be read are left out."""
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
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    wanted = fraction * sum(len(text) for text in files.values())
    chosen: set[str] = set()
    size = 0
    for name in order[:-1]:
        if size >= wanted:
            break
        # One huge file must not swallow the training text.
        if not chosen or size + len(files[name]) <= 2 * wanted:
            chosen.add(name)
            size += len(files[name])
    return chosen


def _to_tensor(text: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())

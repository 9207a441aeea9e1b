"""Damaged files: the same result, one sentence, or another value where the format has no checksum.

A few mutations for each reader, and with --full thousands; MUTATIONS=3000 sets how many in all.
"""

from __future__ import annotations

import collections
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ops.testing import seed_from

from .hf_readers import READERS as HF_READERS
from .mutations import mutate
from .readers import READERS, Reader

pytestmark = pytest.mark.cpu_only

SECONDS = 5.0
FEW = 8  # For each reader in the normal suite; fewer where transformers builds a model each time.
FEW_MODELS = 3
MANY = 3200
# Far above what reading a small file takes, far below what a mutated size asks for.
MOST_MEMORY_KIB = 2**19
MOST_ADDRESSES = 2**33


class TooLongError(BaseException):
    """A reader that takes longer than SECONDS."""


def _count(reader: Reader, full: bool) -> int:
    every = len(READERS) + len(HF_READERS)
    wanted = os.environ.get("MUTATIONS")
    if wanted is not None:
        return -(-int(wanted) // every)
    if full:
        return -(-MANY // every)
    return FEW_MODELS if reader in HF_READERS else FEW


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
        return alike and _bytes(a) == _bytes(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        alike = type(a) is type(b) and len(a) == len(b)
        return alike and all(map(_same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _in_package(error: BaseException) -> bool:
    """Returns whether the traceback of an error passes through moe_ops."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(f"{os.sep}moe_ops{os.sep}" in frame.filename for frame in frames)


def _problem(reader: Reader, error: Exception, folder: Path) -> str | None:
    """Returns the fault of an error's sentence; None without one."""
    text = str(error)
    names = [path.name for path in folder.rglob("*")] + [str(folder)]
    if type(error) not in reader.errors:
        return f"is a {type(error).__name__}"
    if "\n" in text or len(text) > 1000:
        return "is no sentence"
    if not any(name in text for name in names):
        return "names no file"
    if not any(word in text for word in (" must ", " cannot ", " is damaged", " needs ")):
        return "does not say what must be"
    return None


def _outcome(reader: Reader, folder: Path, made: Any, wanted: Any) -> tuple[str, str]:
    """Kind of the outcome, and what to say of it."""

    def late(*_: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    started = time.monotonic()
    try:
        found = reader.read(folder, made)
    except TooLongError as error:
        return "late", "".join(traceback.format_tb(error.__traceback__)[-3:])
    except Exception as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() - started > SECONDS:
            return "late", str(error)
        if reader.above and not _in_package(error):
            return "transformers", f"{type(error).__name__}: {error}"
        problem = _problem(reader, error, folder)
        if problem is None:
            return "sentence", str(error)
        where = "".join(traceback.format_exception(error)[-6:])
        return "raw", f"{problem}: {where}"
    except BaseException as error:  # A panic of a library in Rust.
        return "raw", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ("equal" if _same(found, wanted) else "changed"), ""


@pytest.fixture
def limited() -> Iterator[None]:
    """A size that a file claims must not become memory; where it does, the process gets none."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_ADDRESSES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(params=[*READERS, *HF_READERS], ids=lambda reader: reader.name)
def reader(request: pytest.FixtureRequest) -> Reader:
    if not request.param.available:
        pytest.skip(f"needs {', '.join(request.param.needs)}")
    return request.param


def _check(reader: Reader, work: Path, count: int) -> collections.Counter[str]:
    whole, folder = work / "whole", work / "folder"
    whole.mkdir()
    made = reader.make(whole)
    shutil.copytree(whole, folder)
    wanted = reader.read(folder, made)
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        rng = random.Random(seed_from(f"{reader.name} {number}"))
        path = rng.choice(sorted(p for p in folder.rglob(reader.files) if p.is_file()))
        said, gone = mutate(path, rng, sealed=reader.sealed, json_only=reader.json_only)
        kind, text = _outcome(reader, folder, made, wanted)
        # Where nothing is there, some readers begin anew; what was made to fit is no damage.
        allowed = (
            not reader.protected
            or "forged" in said
            or (reader.missing and gone and said in ("absent", "circle"))
        )
        if kind == "changed" and not allowed:
            kind = "unnoticed"
        counts[kind] += 1
        if kind in ("raw", "late", "unnoticed"):
            wrong.append(f"{reader.name} {number}: {path.name}: {said}: {kind}: {text}")
        elif os.environ.get("SHOW") and kind in (os.environ["SHOW"], "transformers"):
            print(f"{reader.name} {number}: {path.name}: {said}: {kind}: {text}", file=sys.stderr)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"\n{reader.name}: {dict(counts)}, {grown} KiB more")
    assert not wrong, "\n".join(wrong)
    assert grown < MOST_MEMORY_KIB, f"{grown} KiB more than before"
    return counts


def test_mutated_files(reader, tmp_path, request, limited):
    counts = _check(reader, tmp_path, _count(reader, request.config.getoption("--full")))
    assert counts["sentence"] + counts["equal"] + counts["changed"] + counts["transformers"] > 0

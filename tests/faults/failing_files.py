"""Makes the n-th call that writes fail, as a full, broken or read-only disk does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

CALLS = ("open", "write", "fsync", "replace", "rename", "link", "mkdir", "fchmod")


class Faults:
    """A record of what happened: the calls so far, and the one that failed."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failed: str | None = None


@contextlib.contextmanager
def failing(at: int, number: int) -> Iterator[Faults]:
    """The `at`-th call (from 0) of one of CALLS raises OSError(number); half a write is done."""
    faults = Faults()
    before = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            place = len(faults.calls)
            faults.calls.append(name)
            if place == at:
                faults.failed = name
                if name == "write":
                    before[name](args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(number, os.strerror(number), *map(str, args[:1]))
            return before[name](*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, wrapped(name)))
        yield faults


def leftovers(folder: Path) -> list[str]:
    """Files that a writer has begun and neither finished nor removed."""
    return [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".part"))]

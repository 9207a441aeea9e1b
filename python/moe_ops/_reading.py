"""Files of strangers, opened without waiting and answered in sentences.

A reader opens what it reads by `open_regular`, so that a named pipe, a folder or a device in the
place of a file is refused at once. It compares sizes that a file claims with the size that the file
has before it takes memory for them. `damage` turns whatever a library raises on the rest into one
sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LONGEST = 200  # Characters of somebody else's message that a sentence repeats.


def open_regular(path: Path | str, reader: str) -> BinaryIO:
    """Opens a regular file for reading, unbuffered; anything else is refused without waiting.

    The file is opened first and looked at afterwards, so that nothing can take its place between
    the two.

    Args:
        reader: starts the sentences: "ExpertTrace.load". With "" they have neither a start nor a
            full stop, for a caller that puts them into one of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is a named pipe, a folder, a socket or a device.
        OSError: it cannot be opened.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise ValueError(_said(reader, f"the name of a file must have no zero byte, got {text!r}"))
    try:
        handle = os.open(
            text,
            os.O_RDONLY
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_NOCTTY", 0)
            | getattr(os, "O_BINARY", 0),
        )
    except FileNotFoundError:
        raise FileNotFoundError(_said(reader, f"{text} must be a file, got no such file")) from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.ELOOP):  # A socket; links in a circle.
            raise ValueError(
                _said(
                    reader,
                    f"{text} must be a regular file, got one of which the system says: "
                    f"{error.strerror}",
                )
            ) from None
        raise
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise ValueError(_said(reader, f"{text} must be a regular file, got {kind}"))
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: Path | str, reader: str) -> int:
    """Checks a file before another library opens it by its name; returns its size in bytes.

    Raises:
        FileNotFoundError, ValueError, OSError: see `open_regular`.
    """
    with open_regular(path, reader) as file:
        return os.fstat(file.fileno()).st_size


def read_bytes(path: Path | str, reader: str, most: int | None = None) -> bytes:
    """Reads a regular file as a whole.

    Args:
        most: bytes that such a file can have; None is no limit.

    Raises:
        FileNotFoundError, OSError: see `open_regular`.
        ValueError: it is no regular file, or larger than `most`.
    """
    with open_regular(path, reader) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(_said(reader, f"{path} must have at most {most} bytes, got {size}"))
        parts = []
        while part := file.read(max(1, min(size, 2**30))):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def check_safetensors(path: Path | str, reader: str) -> None:
    """Checks that a safetensors file is regular and has room for the header that it claims, before
    the library of that name opens it.

    Raises:
        FileNotFoundError, OSError: see `open_regular`.
        ValueError: it is no such file.
    """
    with open_regular(path, reader) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                _said(
                    reader,
                    f"{path} must be a whole safetensors file, got {size} bytes with a header of "
                    f"{length}",
                )
            )


def _said(reader: str, text: str) -> str:
    return f"{reader}: {text}." if reader else text


def reason(error: BaseException) -> str:
    """The first line of somebody else's message, cut where it is long, without its full stop."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    if isinstance(error, KeyError):
        text = f"no entry {text}"
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    return text.rstrip(".:") or type(error).__name__


@contextlib.contextmanager
def damage(reader: str, path: Path | str, wanted: str) -> Iterator[None]:
    """Turns whatever is raised inside into a ValueError of one sentence.

    Sentences of `reader`, missing files, missing packages, failing disks and an exhausted memory
    pass as they are.

    Args:
        reader: starts the sentence.
        wanted: ends "must be ...": "a whole safetensors file".
    """
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError):
        raise
    except Exception as error:
        ours = isinstance(error, ValueError) and str(error).startswith(f"{reader}: ")
        # A place before the file's first byte, which a damaged file can name, is EINVAL.
        failing = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if ours or failing:
            raise
        raise ValueError(
            f"{reader}: {path} must be {wanted}, got something else: {reason(error)}."
        ) from error

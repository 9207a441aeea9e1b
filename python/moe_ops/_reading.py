"""Non-blocking opening of untrusted files, with errors as sentences.

Readers use `open_regular`, which immediately rejects a named pipe, a folder or a device in place of
a file. They compare sizes claimed by a file with its real size before they allocate memory.
`damage` converts errors of libraries to one sentence.
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
_LONGEST = 200  # Maximum number of characters of another library's message in a sentence.


def open_regular(path: Path | str, reader: str) -> BinaryIO:
    """Opens a regular file for reading, unbuffered; rejects anything else without blocking.

    The file is checked after it was opened, so that nothing can replace it in between.

    Args:
        path: of the file.
        reader: start of the messages: "ExpertTrace.load". With "" they have neither a start nor a
            full stop, for callers that embed them.

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
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.ELOOP):  # A socket; a cycle of links.
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
    """Checks a file before another library opens it by name; returns its size in bytes.

    Raises:
        FileNotFoundError, ValueError, OSError: see `open_regular`.
    """
    with open_regular(path, reader) as file:
        return os.fstat(file.fileno()).st_size


def read_bytes(path: Path | str, reader: str, most: int | None = None) -> bytes:
    """Reads a complete regular file.

    Args:
        most: maximum number of bytes; None is no limit.

    Raises:
        FileNotFoundError, OSError: see `open_regular`.
        ValueError: it is not a regular file, or is larger than `most`.
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
    """Checks that a safetensors file is regular and large enough for its header, before safetensors
    opens it.

    Raises:
        FileNotFoundError, OSError: see `open_regular`.
        ValueError: it is not such a file.
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
    """Returns the first line of another library's message, shortened if long, without its full
    stop."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    if isinstance(error, KeyError):
        text = f"no entry {text}"
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    return text.rstrip(".:") or type(error).__name__


@contextlib.contextmanager
def damage(reader: str, path: Path | str, wanted: str) -> Iterator[None]:
    """Converts exceptions inside the context to a ValueError with one sentence.

    Messages of `reader`, missing files, missing packages, failing disks and out-of-memory errors
    pass unchanged.

    Args:
        reader: start of the sentence.
        path: of the file.
        wanted: end of "must be ...": "a whole safetensors file".
    """
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError):
        raise
    except Exception as error:
        ours = isinstance(error, ValueError) and str(error).startswith(f"{reader}: ")
        # A negative file position, which a damaged file can contain, is EINVAL.
        failing = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if ours or failing:
            raise
        raise ValueError(
            f"{reader}: {path} must be {wanted}, got something else: {reason(error)}."
        ) from error

"""Atomic writes of files, and safe reads of untrusted files.

Every writer of the package uses `write_file` or `Replacement`: the bytes are written to a new file
in the same folder and flushed to disk, and the new file then takes the name in one step. After an
error, a kill or a power cut, a reader finds the old file or the new one, and processes that have
the old one open or mapped keep it. An error removes the new file. The next write into the folder
removes leftovers of killed processes; a lock distinguishes them from files in use.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moe_ops import _reading

try:
    import fcntl
except ImportError:  # Not a POSIX system; leftovers of killed processes are not removed.
    fcntl = None  # type: ignore[assignment]

# Far larger than any config.json or index, far smaller than a machine's memory.
MAX_JSON_BYTES = 256 * 2**20
_PREFIX, _SUFFIX = ".moe_ops-", ".tmp"
_MAX_WRITE = 2**30
# The file system does not support an operation, as opposed to a failure.
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}

Buffer = bytes | bytearray | memoryview


class WriteError(OSError):
    """A file or folder that could not be written; the message is a sentence."""

    def __init__(self, path: Path | str, error: OSError) -> None:
        reason = error.strerror or str(error)
        super().__init__(error.errno, f"{path} cannot be written: {reason}", str(path))

    def __str__(self) -> str:
        return str(self.strerror)


def describe(error: OSError) -> str:
    """Returns the message of an error, without the number that Python prepends."""
    if error.errno is None or isinstance(error, WriteError):
        return str(error)
    where = "a write or read failed" if error.filename is None else error.filename
    return f"{where}: {error.strerror}"


# --- writing


def write_file(path: Path | str, *parts: Buffer) -> None:
    """Writes a file in one step, replacing an existing file; follows symbolic links.

    Raises:
        WriteError: it could not be written. The old file is then unchanged, or, if only the last
            flush of the folder failed, the new one is complete.
    """
    path = Path(path)
    with sentence(path):
        target = Path(os.path.realpath(path))
        try:
            mode = os.stat(target).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):  # /dev/stdout or a pipe must not be replaced by a file.
            handle = os.open(target, os.O_WRONLY)
            try:
                _write_all(handle, parts)
            finally:
                os.close(handle)
            return
    with Replacement(target.parent) as files:
        files.add(target.name, *parts)


def write_text(path: Path | str, text: str) -> None:
    """Calls `write_file` with UTF-8 text."""
    write_file(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Calls `write_file` with indented JSON and a newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def make_folder(path: Path | str) -> Path:
    """Creates a folder and its missing parents.

    Raises:
        WriteError: a file has this name, or the file system reports an error.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        error = NotADirectoryError(errno.ENOTDIR, "it must be a folder, got a file")
        raise WriteError(path, error) from None
    except OSError as error:
        raise WriteError(path, error) from None
    return path


class Replacement:
    """Files of one folder that are replaced together.

    As a context manager it commits at the end, or leaves everything unchanged after an exception.
    `add` writes files next to those that they replace, so that a commit consists only of renames.
    An error in one of these restores the old files.

    A process killed between two renames would leave a mixture of old and new files. Therefore
    `last` is removed first and added last: readers that need it find the folder incomplete.

    Args:
        folder: must exist.
        last: a file without which readers cannot use the others.
    """

    def __init__(self, folder: Path | str, *, last: str | None = None) -> None:
        self.folder = Path(folder)
        self.last = last
        self._new: dict[str, Path] = {}
        self._removed: list[str] = []
        self._staged: list[Path] = []
        self._handles: list[int] = []

    def add(self, name: str, *parts: Buffer) -> None:
        """Writes the new contents of `name`."""
        path = self.folder / name
        with sentence(path):
            with _locked(self.folder):
                _remove_leftovers(self.folder)
                temporary, handle = _create(self.folder)
                # Kept open until the end: its lock marks the file as in use.
                self._handles.append(handle)
                self._new[name] = temporary
            try:
                os.fchmod(handle, os.stat(path).st_mode & 0o777)
            except (FileNotFoundError, PermissionError):
                pass
            _write_all(handle, parts)
            os.fsync(handle)

    def adopt(self, name: str, path: Path) -> None:
        """Takes a file that another library has written in the same file system."""
        with sentence(path):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._new[name] = path

    def staging(self) -> Path:
        """Returns a folder for another library to write into, on the same file system; then call
        `adopt`."""
        with sentence(self.folder), _locked(self.folder):
            _remove_leftovers(self.folder)
            path = _temporary(self.folder)
            os.mkdir(path)
            self._staged.append(path)
            self._handles.append(_lock(os.open(path, os.O_RDONLY)))
        return path

    def remove(self, *patterns: str) -> None:
        """Removes old files that match these shell patterns on commit, unless new ones replace
        them."""
        self._removed += patterns

    def commit(self) -> None:
        with sentence(self.folder), _locked(self.folder) as handle:
            # Files are listed here because others may have written until now.
            removed = [
                path.name
                for pattern in self._removed
                for path in self.folder.glob(pattern)
                if path.name not in self._new
            ]
            last = self._new.get(self.last or "")
            if last and not removed and len(self._new) == 2 and self._is_there(last):
                del self._new[str(self.last)]
                os.unlink(last)
            if len(self._new) == 1 and not removed:
                # A rename replaces one file in one step; there is nothing to restore.
                ((name, temporary),) = self._new.items()
                os.replace(temporary, self.folder / name)
                self._new.clear()
            else:
                self._swap(removed)
            _fsync_folder(handle)

    def _is_there(self, last: Path) -> bool:
        """Returns whether the old `last` has the contents of the new one."""
        try:
            return filecmp.cmp(last, self.folder / str(self.last), shallow=False)
        except OSError:
            return False

    def _swap(self, removed: list[str]) -> None:
        order = sorted(self._new, key=lambda name: name == self.last)
        old: dict[str, Path] = {}
        placed: list[str] = []
        try:
            for name in dict.fromkeys([*reversed(order), *removed]):
                backup = _temporary(self.folder)
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.folder / name, backup)
                    old[name] = backup
            for name in order:
                os.replace(self._new[name], self.folder / name)
                placed.append(name)
        except BaseException:
            for name in placed:
                if name not in old:
                    with contextlib.suppress(OSError):
                        os.unlink(self.folder / name)
            for name, backup in reversed(old.items()):  # `last` is restored last here too.
                with contextlib.suppress(OSError):
                    os.replace(backup, self.folder / name)
            raise
        self._new.clear()
        for backup in old.values():
            with contextlib.suppress(OSError):
                os.unlink(backup)

    def close(self) -> None:
        """Removes files that were written and not committed."""
        for temporary in self._new.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        self._new.clear()
        while self._staged:
            shutil.rmtree(self._staged.pop(), ignore_errors=True)
        while self._handles:
            with contextlib.suppress(OSError):
                os.close(self._handles.pop())

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file for incremental writing; it replaces `path` when it is complete.

    Raises:
        WriteError: it could not be written; the old file is unchanged.
    """
    with Replacement(make_folder(path.parent)) as files:
        new = files.staging() / path.name
        with sentence(path), new.open("wb") as file:
            yield file
        files.adopt(path.name, new)


@contextlib.contextmanager
def sentence(path: Path) -> Iterator[None]:
    """Converts an OSError to a WriteError."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


def _temporary(folder: Path) -> Path:
    return folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def _create(folder: Path) -> tuple[Path, int]:
    """Creates a new locked file with a unique name."""
    path = _temporary(folder)
    return path, _lock(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _lock(handle: int) -> int:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # The file system has no locks.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _write_all(handle: int, parts: tuple[Buffer, ...]) -> None:
    for part in parts:
        view = memoryview(part).cast("B")
        while view:
            view = view[os.write(handle, view[:_MAX_WRITE]) :]


def _remove_leftovers(folder: Path) -> None:
    """Removes leftovers of killed processes: files with this module's names and no lock."""
    if fcntl is None:
        return
    for entry in os.scandir(folder):
        if not (entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX)):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            finally:
                os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Locks the folder, so that only one process of this package changes names in it; yields its
    handle."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # The file system has no locks.
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _fsync_folder(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


# --- reading what strangers made


def inside(folder: Path, name: object) -> Path:
    """Returns the path of the regular file `name` in `folder`.

    A symbolic link may point to a file in the folder, or to the blobs of a Hugging Face cache,
    whose snapshots are folders of such links.

    Raises:
        ValueError: a name outside of the folder, or something that is not a regular file.
        FileNotFoundError: no such file.
    """
    said = f"{folder} must hold what it names inside itself, got {name!r}"
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{said}, which is not a file name")
    root = Path(os.path.realpath(folder))
    path = root / name
    target = Path(os.path.realpath(path))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    lexical = Path(os.path.normpath(path))
    if not lexical.is_relative_to(root) or not any(target.is_relative_to(a) for a in allowed):
        raise ValueError(f"{said}, which leads to {target}")
    try:
        mode = os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{folder} must hold {name}, got no such file") from None
    except OSError as error:  # For example, a link to itself.
        raise ValueError(f"{folder / name} must be a file, got: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{folder / name} must be a file, got something else")
    return path


def check_folder(folder: Path, index: str) -> None:
    """Checks that all references of a folder stay inside it, before another library reads it.

    Args:
        index: name of the index of the safetensors files, if there is one.

    Raises:
        ValueError: a link or an entry of the index points outside of the folder, or it contains a
            special file such as a pipe.
        FileNotFoundError: an entry of the index or a link points to a missing file.
    """
    for path in folder.iterdir():
        if path.is_symlink():
            inside(folder, path.name)
        elif not path.is_file() and not path.is_dir():  # Reading a pipe would block.
            raise ValueError(f"{path} must be a file, got something else")
    if (folder / index).exists():
        names = read_json(inside(folder, index)).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(
                f"weight_map of {folder / index} must be an object, got {shown(names)}"
            )
        for name in {shown(name): name for name in names.values()}.values():
            inside(folder, name)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a regular file, contains something else, or is too large.
    """
    content = _reading.read_bytes(path, "", MAX_JSON_BYTES)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got something else: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(value)}")
    return value


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Returns a value that changes when the file is replaced; None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def shown(value: object) -> str:
    """Returns a short description of a value from a file, for messages."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, str) and len(value) > 60:
        return f"{value[:60]!r}…"
    return repr(value)

"""Interpreters that import the same moe_ops as this one, and have imported nothing of it yet."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import moe_ops

ROOT = Path(__file__).parents[2]


def run_python(
    *arguments: str,
    timeout: float = 120,
    env: Mapping[str, str | None] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    transformers: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` (``-c CODE``, ``-m MODULE`` or a file, and its arguments).

    The process is forked from one that has imported torch, which takes longer than most of what
    tests run. It has one thread, and finds modules where this process does.

    Args:
        timeout: seconds, after which it is ended.
        env: environment variables beside those of this process, or instead of them; None: unset.
        cwd: its folder (this process's).
        transformers: fork it from a process that has imported transformers too.
    """
    path = [str(Path(moe_ops.__file__).parents[1]), str(ROOT), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    changed = {**environment, **(env or {})}
    request = {
        "arguments": arguments,
        "env": {name: value for name, value in changed.items() if value is not None},
        "cwd": os.fspath(cwd or os.getcwd()),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdout", "stderr")}
        for name, file in files.items():
            file.touch()
            request[name] = str(file)
        code = _server(transformers).run(json.dumps(request), timeout)
        texts = (file.read_text(errors="replace") for file in files.values())
        result = subprocess.CompletedProcess(list(arguments), code or 0, *texts)
    if code is None:
        raise subprocess.TimeoutExpired(result.args, timeout, result.stdout, result.stderr)
    return result


@functools.cache
def _server(transformers: bool) -> _Server:
    server = _Server("torch", *["transformers.modeling_utils"][: int(transformers)])
    atexit.register(server.close)
    return server


class _Server:
    """fork_server.py, with modules that it imports first."""

    def __init__(self, *modules: str) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), *modules],
                env=environment | {"OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def run(self, request: str, timeout: float) -> int | None:
        """Returns the status of a process, or None if it had to be ended."""
        self._socket.sendall(f"{request}\n".encode())
        child = self._answer()
        # Unlike select, poll takes file descriptors beyond 1023.
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        in_time = bool(poll.poll(timeout * 1000))
        if not in_time:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = self._answer()
        return status if in_time else None

    def _answer(self) -> int:
        (number,) = struct.unpack("i", self._socket.recv(4, socket.MSG_WAITALL))
        return int(number)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

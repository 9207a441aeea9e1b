"""A process that imports modules once and forks an interpreter for each request on its socket.

Run by fresh_python.py: `python fork_server.py DESCRIPTOR MODULE ...`. A request is a line of JSON;
the answers are the process's number, then its status, as integers of four bytes.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import struct
import sys
import traceback
import types
from typing import Any


def serve(descriptor: int) -> tuple[int, dict[str, Any]] | None:
    """Returns None when the socket is closed, and in each forked process its request."""
    with os.fdopen(os.dup(descriptor)) as requests:
        for line in requests:
            child = os.fork()
            if child == 0:
                os.close(descriptor)
                request: dict[str, Any] = json.loads(line)
                return request
            os.write(descriptor, struct.pack("i", child))
            _, status = os.waitpid(child, 0)
            os.write(descriptor, struct.pack("i", os.waitstatus_to_exitcode(status)))
    return None


def become(request: dict[str, Any], path: list[str]) -> None:
    """Does what `python ARGUMENTS` does in a folder and an environment."""
    for target, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_APPEND)
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    kind, *arguments = request["arguments"]
    given = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    first = "" if kind == "-c" else os.getcwd()
    if kind not in ("-c", "-m"):
        first = os.path.dirname(os.path.abspath(kind))
    sys.path[:] = [first, *given, *path]
    if kind == "-c":
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = request["arguments"]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    packages = sys.path[1:]
    for module in sys.argv[2:]:
        importlib.import_module(module)
    wanted = serve(int(sys.argv[1]))
    if wanted is not None:
        try:
            become(wanted, packages)
        except Exception:
            traceback.print_exc()
            sys.exit(1)

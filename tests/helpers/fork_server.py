"""A process that imports modules once and forks an interpreter for each request on its socket.

Run by fresh_python.py: `python fork_server.py DESCRIPTOR MODULE ...`. A request is a line of JSON;
the answers are the process's number, then its status, as integers of four bytes.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import struct
import sys
import threading
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


def run(request: dict[str, Any], path: list[str]) -> int:
    """Returns the status with which `python ARGUMENTS` ends."""
    try:
        become(request, path)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    packages = sys.path[1:]
    for module in sys.argv[2:]:
        importlib.import_module(module)
    wanted = serve(int(sys.argv[1]))
    if wanted is not None:
        code = run(wanted, packages)
        # Freeing all that was imported would take longer than most of what is run.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

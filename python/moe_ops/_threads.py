"""Wait policy of OpenMP threads in the commands of this package.

Between two parallel regions a thread spins, unless ``OMP_WAIT_POLICY`` is ``passive``. On a busy
machine, a spinning thread occupies the core that the thread it waits for needs, and small training
steps consist of thousands of regions. But a thread that sleeps immediately must be woken for each
of them, which costs as much as a short region on an idle machine. ``GOMP_SPINCOUNT`` makes GNU's
OpenMP, torch's on Linux, spin for a few microseconds first. OpenMP reads both variables once, when
torch loads it, so they must be set before torch is imported. A library leaves that to the program
that uses it; ``moe-ops`` and ``python -m moe_ops...`` are programs, and use the passive policy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

# Number of loop iterations in which a thread waits before it sleeps.
SPIN_COUNT = 1000
# True if this module set the policy of the process.
set_here = False


def runs_a_command(line: Sequence[str]) -> bool:
    """Returns whether a command line, as in ``sys.orig_argv``, starts a command of this package."""
    arguments = iter(line[1:])
    for argument in arguments:
        if argument == "-m":
            return next(arguments, "").split(".")[0] == "moe_ops"
        if argument in ("-X", "-W"):
            next(arguments, "")
        elif not argument.startswith("-"):
            return PurePath(argument).stem == "moe-ops"
    return False


def sleep_in_commands() -> None:
    """Sets the passive policy in a command without a policy, if torch is not loaded yet."""
    global set_here
    if "OMP_WAIT_POLICY" in os.environ or "torch" in sys.modules:
        return
    if runs_a_command(sys.orig_argv):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
        set_here = True

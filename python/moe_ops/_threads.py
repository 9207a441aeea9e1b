"""How OpenMP's threads wait for each other in the commands of this package.

Between two parallel regions a thread spins, unless ``OMP_WAIT_POLICY`` is ``passive``. On a machine
with other work a spinning thread keeps the core that the thread it waits for needs, and small
training steps are made of thousands of regions. But a thread that sleeps at once must be woken for
each of them, which costs as much as a short region on a machine that has nothing else to do.
``GOMP_SPINCOUNT`` lets GNU's OpenMP, torch's on Linux, spin for a few microseconds first. OpenMP
reads both once, when torch loads it, so they have to be set before torch is imported. A library
leaves that to the program that uses it; ``moe-ops`` and ``python -m moe_ops...`` are programs, and
sleep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

# Iterations of the loop in which a thread waits before it sleeps.
SPIN_COUNT = 1000
# Whether the policy of this process was chosen here.
set_here = False


def runs_a_command(line: Sequence[str]) -> bool:
    """Whether a command line, as in ``sys.orig_argv``, starts a command of this package."""
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
    """Sets the passive policy in a command that has none, if torch is not loaded yet."""
    global set_here
    if "OMP_WAIT_POLICY" in os.environ or "torch" in sys.modules:
        return
    if runs_a_command(sys.orig_argv):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
        set_here = True

"""Benchmarks of moe_ops against other libraries, and the experiments of the zoo.

Threads sleep soon while they wait for each other, as in the package's commands (see
``moe_ops._threads``): OpenMP reads that setting once, when torch loads it.
"""

import os
import sys

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

"""Measurements of moe_ops beside other libraries, and the experiments of the zoo.

Threads soon sleep while they wait for each other, as in the commands of the package
(``moe_ops._threads``, which says why): OpenMP reads that once, when torch loads it.
"""

import os
import sys

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

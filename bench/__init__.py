"""Measurements of moe_ops beside other libraries, and the experiments of the zoo.

Threads sleep while they wait for each other, as in the commands of the package
(``moe_ops._threads``): OpenMP reads that once, when torch loads it.
"""

import os
import sys

if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

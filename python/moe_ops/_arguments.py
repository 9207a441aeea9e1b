"""Ranges of the commands' numeric arguments, without a command-line library.

Larger values would fail later with less clear errors: OpenMP crashes with too many threads, and a
history of too many steps does not fit into memory.
"""

from __future__ import annotations

import os

MAX_THREADS = max(256, os.cpu_count() or 1)
MAX_STEPS = 1_000_000
MAX_TOKENS = 2**24
MAX_RANKS = 2**20
MAX_SEED = 2**63 - 1

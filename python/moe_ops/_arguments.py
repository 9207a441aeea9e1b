"""What numbers the commands take: ranges in one place, without a library for command lines.

Numbers beyond them would only fail later and worse: OpenMP dies of too many threads, and a history
of too many steps does not fit into memory.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

MAX_THREADS = max(256, os.cpu_count() or 1)
MAX_STEPS = 1_000_000
MAX_MINUTES = 7 * 24 * 60.0
MAX_SECONDS = 24 * 3600.0
MAX_TOKENS = 2**24
MAX_SEEDS = 10_000
MAX_SEED = 2**63 - 1


def whole(least: int, most: int) -> Callable[[str], int]:
    """For argparse's `type`: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} to {most}, got {text}"
            )
        return value

    return parse


def seconds(text: str) -> float:
    """For argparse's `type`: a number above 0 and at most MAX_SECONDS."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            f"must be a number above 0 and at most {MAX_SECONDS:g}, got {text}"
        )
    return value

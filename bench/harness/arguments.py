"""Argument types for argparse, with ranges."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

MAX_SECONDS = 24 * 3600.0


def whole(least: int, most: int) -> Callable[[str], int]:
    """Returns an argparse `type`: an integer from `least` to `most`."""

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
    """Parses a number above 0 and at most MAX_SECONDS, for argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            f"must be a number above 0 and at most {MAX_SECONDS:g}, got {text}"
        )
    return value

"""Sizes of arms with matched numbers of parameters."""

from __future__ import annotations

from collections.abc import Callable


def width(parameters: Callable[[int], int], target: int) -> int:
    """Returns the width, at least 1, whose number of parameters is nearest to `target`; the number
    must be linear in the width."""
    one, two = parameters(1), parameters(2)
    return max(1, 1 + round((target - one) / (two - one)))

"""Performance targets of this project, and whether a run reaches them.

A target is a value that every cell of a group must reach; its verdict names the worst cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Verdict on a target. `worst` is the worst cell's value and `where` its name, for readers;
    None if nothing was measured.

    `at_limit`: that cell's ratio if ours ran at its limit; None if ours is faster than that, with
    its weights in a cache. `out_of_reach`: the target is missed, and in no cell that misses it
    would running at the limit be enough.
    """

    target: str
    must: str
    worst: str | None
    where: str
    met: bool
    missing: tuple[str, ...] = ()
    at_limit: str | None = None
    out_of_reach: bool = False


def judge(
    target: str,
    must: str,
    values: list[tuple[float, str]],
    bound: float,
    show: Callable[[float], str],
    *,
    most: bool = False,
) -> Verdict:
    """Returns the verdict on (value, where) pairs that must be at least `bound`, or at most with
    `most`."""
    if not values:
        return Verdict(target, must, None, "", False)
    worst, where = (max if most else min)(values)
    missing = [v for v in sorted(values) if (v[0] > bound if most else v[0] < bound)]
    names = tuple(f"{where} {show(value)}" for value, where in missing)
    return Verdict(target, must, show(worst), where, not missing, names)

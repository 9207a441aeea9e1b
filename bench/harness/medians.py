"""Median times of a few functions to compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from moe_ops.bench.timing import interleave


def median_ms(
    jobs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Returns the median ms of each, interleaved; `warm` calls of each before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in jobs}

    def sample(name: str, number: int) -> None:
        start = clock()
        jobs[name]()
        if number >= warm:
            times[name].append(1e3 * (clock() - start))

    interleave(list(jobs), sample, lambda number: number < rounds + warm)
    return {name: statistics.median(t) for name, t in times.items()}

"""Contenders that take turns in one process, so that what else the machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median ms of each; `warm` calls of each first, which count for nothing."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + warm):
        for name, run in contenders.items():
            start = clock()
            run()
            if i >= warm:
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(t) for name, t in times.items()}

"""Interleaved measurements: a change of the machine's speed affects all compared jobs.

Every round takes one sample of each job, in an order that rotates from round to round; `interleave`
is that loop, for any kind of sample. `measure` uses it to time functions on the CPU. A short job
runs once untimed before its sample: its limits are measured with warm caches, and interleaving
would leave another job's data there. A sample in which a thread of this process waited for a core
held by another process is repeated once and, if it waited again, left out. Times are medians,
ratios the medians of per-round ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TASKS = Path("/proc/self/task")
# A round of a fast job repeats it, to reduce the influence of the clock and the scheduler.
_SAMPLE_S = 0.01
_MAX_REPEATS = 200
# A longer job reads more than a cache holds, or computes longer than reading it takes.
_SHORT_S = 0.02
# Fraction of a sample's time. Shorter waiting is lost in the noise.
_WAIT_SHARE = 0.02


@dataclass
class Samples:
    """Seconds of one job, by round. `waited` are the rounds in which it waited for a core."""

    seconds: dict[int, float] = field(default_factory=dict)
    waited: dict[int, float] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Returns whether the median is over samples that did not wait: at least three, or all
        samples."""
        return len(self.seconds) >= min(3, len(self.seconds) + len(self.waited))

    @property
    def used(self) -> dict[int, float]:
        return self.seconds if self.clean else {**self.seconds, **self.waited}

    @property
    def median(self) -> float:
        return statistics.median(self.used.values())

    def to_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {"ms": self.median * 1e3, "rounds": len(self.used)}
        if self.waited:
            result["waited"] = len(self.waited)
        if not self.clean:
            result["noisy"] = True
        return result


def interleave(
    names: Sequence[str], sample: Callable[[str, int], object], more: Callable[[int], bool]
) -> None:
    """Calls ``sample(name, round)`` once per round for each name, while ``more(round)`` is true."""
    number = 0
    while more(number):
        shift = number % max(1, len(names))
        for name in (*names[shift:], *names[:shift]):
            sample(name, number)
        number += 1


def measure(
    jobs: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = 41,
    slow_s: float = 6.0,
    first_s: Mapping[str, float] | None = None,
) -> dict[str, Samples]:
    """Times the jobs, interleaved, until the budget is spent.

    Args:
        jobs: what to run, by name.
        budget_s: seconds for all rounds together; warm-up and `min_rounds` may exceed it.
        min_rounds, max_rounds: for every job except slow ones.
        slow_s: a job whose second call takes longer is not called again. A job that would take a
            sixth of the budget per round stops after `min_rounds`.
        first_s: seconds of the first call, for jobs that were already called.

    Returns:
        The samples of each job.
    """
    samples = {name: Samples() for name in jobs}
    counts: dict[str, int] = {}
    short, slow = set[str](), set[str]()
    for name, job in jobs.items():
        known = (first_s or {}).get(name)
        first = _timed(job, 1) if known is None else known
        # The first call may have loaded, allocated and faulted pages in. That is negligible in half
        # a second or more, and such calls are worth saving, unless they decide whether the job is
        # slow.
        is_steady = known is not None and 0.5 < first <= slow_s
        second = first if is_steady else min(first, _timed(job, 1))
        if second > slow_s:
            samples[name].seconds[0] = second
            continue
        counts[name] = max(1, min(_MAX_REPEATS, round(_SAMPLE_S / max(1e-6, second))))
        if second < _SHORT_S:
            short.add(name)
        if second > budget_s / 6:
            slow.add(name)
    end = time.perf_counter() + budget_s

    def more(number: int) -> bool:
        return number < max_rounds and (number < min_rounds or time.perf_counter() <= end)

    def sample(name: str, number: int) -> None:
        if name in slow and number >= min_rounds:
            return
        if name in short:
            jobs[name]()
        _take(samples[name], number, jobs[name], counts[name])

    interleave(list(counts), sample, more)
    return samples


def speedup(samples: Mapping[str, Samples], ours: str, other: str) -> float:
    """Returns the median over rounds of `other`'s time divided by that of `ours`."""
    a, b = samples[other].used, samples[ours].used
    shared = a.keys() & b.keys()
    if len(shared) < 3:
        return samples[other].median / samples[ours].median
    return statistics.median(a[r] / b[r] for r in shared)


def waited_s() -> float:
    """Returns the seconds that threads of this process were ready without a core; 0 if not measured
    by the system."""
    total = 0
    try:
        for task in _TASKS.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
            except (OSError, IndexError, ValueError):
                continue  # The thread has ended meanwhile.
    except OSError:
        return 0.0
    return total * 1e-9


def _take(samples: Samples, round_number: int, job: Callable[[], object], repeats: int) -> None:
    for attempt in range(2):
        before = waited_s()
        seconds = _timed(job, repeats)
        waited = waited_s() - before
        if waited <= _WAIT_SHARE * seconds * repeats:
            samples.seconds[round_number] = seconds
            return
        if attempt == 1 or seconds * repeats > 1.0:
            samples.waited[round_number] = seconds
            return


def _timed(job: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        job()
    return (time.perf_counter() - started) / repeats

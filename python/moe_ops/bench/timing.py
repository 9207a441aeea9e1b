"""Interleaved measurements: a change of the machine's speed meets everything that is compared.

Every round takes one sample of each job, in an order that rotates from round to round; `interleave`
is that loop, for whatever a sample is. `measure` times functions on the CPU with it. A short job
runs once untimed before its sample: the limits it is compared with are those of warm caches, and
interleaved it would find there what the job before it left. A sample in which a thread of this
process waited for a core that another process held is repeated once and, if that one waited too,
left out. Times are medians, ratios the medians of the ratios of a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TASKS = Path("/proc/self/task")
# A round of a fast job repeats it, so that the clock and the scheduler do not decide.
_SAMPLE_S = 0.01
_MAX_REPEATS = 200
# A job that takes longer reads more than a cache holds, or computes longer than reading it takes.
_SHORT_S = 0.02
# A share of a sample's time. Waiting that takes less is lost in the noise.
_WAIT_SHARE = 0.02


@dataclass
class Samples:
    """Seconds of one job, by round. `waited` are the rounds in which it had to wait for a core."""

    seconds: dict[int, float] = field(default_factory=dict)
    waited: dict[int, float] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether the median is of samples that did not wait: three, or all there are."""
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
    """Calls ``sample(name, round)`` once per round for each name, as long as ``more(round)``."""
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
        budget_s: seconds for all rounds together; warming up comes on top, and `min_rounds` do.
        min_rounds, max_rounds: of every job but slow ones.
        slow_s: a job whose second call takes longer is not called again. One that would take a
            sixth of the budget a round stops after `min_rounds`.
        first_s: seconds of a first call, of jobs that have been called.

    Returns:
        The samples of each job.
    """
    samples = {name: Samples() for name in jobs}
    counts: dict[str, int] = {}
    short, slow = set[str](), set[str]()
    for name, job in jobs.items():
        known = (first_s or {}).get(name)
        first = _timed(job, 1) if known is None else known
        # The first call may have loaded, allocated and faulted pages in. That is nothing in half a
        # second or more, which are worth saving, unless they decide whether the job is slow.
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
    """Median over rounds of how many times longer `other` took."""
    a, b = samples[other].used, samples[ours].used
    shared = a.keys() & b.keys()
    if len(shared) < 3:
        return samples[other].median / samples[ours].median
    return statistics.median(a[r] / b[r] for r in shared)


def waited_s() -> float:
    """Seconds that the threads of this process stood ready without a core; 0 if nobody counts."""
    total = 0
    try:
        for task in _TASKS.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
            except (OSError, IndexError, ValueError):
                continue  # A thread that has ended meanwhile.
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

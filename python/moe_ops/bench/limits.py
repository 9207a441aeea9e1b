"""Limits of this machine, measured beside the baselines, and the resulting minimum times."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moe_ops import _library

# Several times the last-level cache of a server core complex.
_BUFFER_BYTES = 512 << 20
# Weights of a small layer stay in a cache from call to call. Larger ones do not: calls that take
# some milliseconds run once or twice per round, and other baselines' weights are read in between.
_CACHED_BYTES = tuple(n << 19 for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32))


@dataclass(frozen=True)
class Limits:
    """Combined rates of `threads` cores, with the instruction set `isa` that moe_ops uses.

    `bf16_flops` is the rate of the instruction that multiplies bfloat16 pairs if the target has
    one, else `fp32_flops`: bfloat16 is then widened. `read_bytes` is a sequential read of a buffer
    in memory, four streams per thread, with or without prefetch, whichever is faster.
    `cached_bytes` has read rates of buffers that may stay in a cache, by size.
    """

    isa: str
    threads: int
    fp32_flops: float
    bf16_flops: float
    read_bytes: float
    cached_bytes: dict[int, float] = field(default_factory=dict)

    def peak(self, dtype: str) -> float:
        """Returns operations per second on weights of this format. Integer weights become bf16 or
        fp32."""
        return self.fp32_flops if dtype == "fp32" else max(self.fp32_flops, self.bf16_flops)

    def read_rate(self, working_set: float) -> float:
        """Returns bytes per second when repeatedly reading this many bytes: the rate of the next
        smaller measured buffer, and from twice the largest buffer on the rate of memory."""
        if not self.cached_bytes or working_set >= 2 * max(self.cached_bytes):
            return self.read_bytes
        smaller = [rate for size, rate in self.cached_bytes.items() if size <= working_set]
        # Reading more is never faster, so a rate that a larger buffer reached by chance applies to
        # smaller ones too.
        return max(min(smaller) if smaller else max(self.cached_bytes.values()), self.read_bytes)

    def floor_s(
        self, flops: float, moved_bytes: float, dtype: str, working_set: float | None = None
    ) -> float:
        """Returns the roofline time: the minimum for any implementation that reads its weights from
        where they stay between calls. `working_set`: bytes touched, if some are read more than
        once."""
        rate = self.read_rate(moved_bytes if working_set is None else working_set)
        return max(flops / self.peak(dtype), moved_bytes / rate)

    def best(self, other: Limits) -> Limits:
        """Returns the larger of each rate: on a shared machine it is nearer to the true rate."""
        names = ("fp32_flops", "bf16_flops", "read_bytes")
        rates = {name: max(getattr(self, name), getattr(other, name)) for name in names}
        ours, theirs = self.cached_bytes, other.cached_bytes
        sizes = sorted({*ours, *theirs})
        cached = {size: max(ours.get(size, 0.0), theirs.get(size, 0.0)) for size in sizes}
        return replace(self, **rates, cached_bytes=cached)

    def to_dict(self) -> dict[str, Any]:
        sizes = {str(size): rate for size, rate in self.cached_bytes.items()}
        return {**asdict(self), "cached_bytes": sizes}


def measure_limits(
    threads: int = 1, *, seconds: float = 0.5, buffer_bytes: int = _BUFFER_BYTES
) -> Limits:
    """Runs the three loops, each for `seconds`, on `threads` threads at once, and reads smaller
    buffers for a tenth of that time.

    With one thread the best pass counts, since other load only lowers a rate; with several threads
    the sum of their medians counts, since in a best pass a thread may have had the memory for
    itself.
    """
    choose = max if threads == 1 else statistics.median

    def rates_of(size: int, duration: float) -> dict[str, float]:
        calls = [pool.submit(_library.measure_limits, size, duration) for _ in range(threads)]
        rates = [call.result() for call in calls]
        return {key: sum(choose(rate[key]) for rate in rates) for key in rates[0]}

    with ThreadPoolExecutor(threads) as pool:
        totals = rates_of(buffer_bytes, seconds)
        cached = {
            size: rates_of(size, seconds / 10)["read_bytes"]
            for size in _CACHED_BYTES
            if size <= buffer_bytes // 2
        }
    return Limits(_library.cpu_isa(), threads, **totals, cached_bytes=cached)

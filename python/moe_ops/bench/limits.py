"""What this machine can do at most, measured beside the contenders, and the time that follows."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from moe_ops import _C

# Several times the last cache of a server core complex.
_BUFFER_BYTES = 512 << 20


@dataclass(frozen=True)
class Limits:
    """Rates of `threads` cores together, of the instruction set `isa` that moe_ops uses.

    `bf16_flops` is the rate of the instruction that multiplies bfloat16 pairs where the level has
    one, else `fp32_flops`: halves are then widened. `read_bytes` is a sequential read of a buffer
    in memory, four streams a thread.
    """

    isa: str
    threads: int
    fp32_flops: float
    bf16_flops: float
    read_bytes: float

    def peak(self, dtype: str) -> float:
        """Operations a second on weights of this format. Integer weights become bf16 or fp32."""
        return self.fp32_flops if dtype == "fp32" else max(self.fp32_flops, self.bf16_flops)

    def floor_s(self, flops: float, weight_bytes: float, dtype: str) -> float:
        """The roofline: no implementation can be faster that reads its weights from memory."""
        return max(flops / self.peak(dtype), weight_bytes / self.read_bytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_limits(
    threads: int = 1, *, seconds: float = 0.5, buffer_bytes: int = _BUFFER_BYTES
) -> Limits:
    """Runs the three loops, each for `seconds`, on `threads` threads at once.

    Alone, the best pass counts, since other load only lowers a rate; with several threads the sum
    of their medians, since a best pass may be one that had the memory for itself.
    """
    with ThreadPoolExecutor(threads) as pool:
        calls = [pool.submit(_C.measure_limits, buffer_bytes, seconds) for _ in range(threads)]
        rates = [call.result() for call in calls]
    choose = max if threads == 1 else statistics.median
    totals = {key: sum(choose(rate[key]) for rate in rates) for key in rates[0]}
    return Limits(_C.cpu_isa(), threads, **totals)

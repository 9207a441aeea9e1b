"""Statistics of few paired differences: intervals, verdicts, and power before a run.

Seeds are few, so quantiles are Student's instead of the normal's. Degrees of freedom are integers,
for which the distribution is a finite sum, so only Python's standard library is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

LEVEL = 0.95
SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown", "contradicted"
# Not computed from differences: the study lacks what the claim is about.
NOT_TESTABLE = "not testable at this size"


def t_cdf(t: float, degrees: int) -> float:
    """Returns P(T <= t) of Student's distribution with integer degrees of freedom, at least 1.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"t_cdf: degrees must be at least 1, got {degrees}.")
    angle = math.atan(t / math.sqrt(degrees))
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    # 1 + (first / (first + 1)) cos^2 + ...: first is 1, 3, 5 or 2, 4, 6.
    term, total = 1.0, 0.0
    for k in range((degrees - odd) // 2):
        total += term
        term *= squared * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    if odd:
        inside = 2 / math.pi * (angle + sine * math.cos(angle) * total)
    else:
        inside = sine * total
    return (1 + inside) / 2


def t_quantile(p: float, degrees: int) -> float:
    """Returns the t with P(T <= t) = p, for 0 < p < 1."""
    if not 0 < p < 1:
        raise ValueError(f"t_quantile: p must be in (0, 1), got {p}.")
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    high = 1.0
    while t_cdf(high, degrees) < p:
        high *= 2
    low = 0.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, degrees) < p else (low, middle)
    return high


class Interval(NamedTuple):
    """Mean of some values and the ends of its two-sided interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Returns Student's interval of the mean; infinite for fewer than two values."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile((1 + level) / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def verdict(found: Interval, bound: float, *, below: bool) -> str:
    """Returns the verdict on the claim that the mean is below (or above) the bound: shown if the
    whole interval is, contradicted if the whole interval is on the other side, otherwise not
    shown."""
    left, right = found.high < bound, found.low > bound
    if left or right:
        return SHOWN if left == below else CONTRADICTED
    return NOT_SHOWN


def power(effect: float, deviation: float, seeds: int, level: float = LEVEL) -> float:
    """Returns the probability that a difference is shown.

    Args:
        effect: distance of the mean beyond the bound, on the claimed side.
        deviation: standard deviation of a single pair's difference.
        seeds: pairs, at least 2.
        level: of the two-sided interval.
    """
    if seeds < 2 or deviation <= 0:
        raise ValueError(
            f"power: seeds must be at least 2 and deviation above 0, got {seeds} and {deviation}."
        )
    degrees = seeds - 1
    needed = t_quantile((1 + level) / 2, degrees)
    shift = effect / deviation * math.sqrt(seeds)
    # The noncentral t: over s, the ratio of sample to true deviation, the probability that a normal
    # variate of mean `shift` is above needed * s. s^2 * degrees is chi-squared.
    scale = math.log(2) + degrees / 2 * math.log(degrees / 2) - math.lgamma(degrees / 2)
    steps, end, normal = 2000, 1 + 10 / math.sqrt(degrees), NormalDist()
    width, total = end / steps, 0.0
    for i in range(steps):
        s = (i + 0.5) * width
        density = math.exp(scale + (degrees - 1) * math.log(s) - degrees * s * s / 2)
        total += width * density * normal.cdf(shift - needed * s)
    return min(total, 1.0)


@cache
def detectable(seeds: int, chance: float = 0.8) -> float:
    """Returns the distance from the bound, in deviations of a single pair, at which `seeds` pairs
    find a mean with this probability."""
    low, high = 0.0, 1.0
    while power(high, 1.0, seeds) < chance:
        high *= 2
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, 1.0, seeds) < chance else (low, middle)
    return high

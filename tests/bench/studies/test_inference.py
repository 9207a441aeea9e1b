"""Intervals, verdicts and power against numbers computed by hand or read from published tables."""

from __future__ import annotations

import math

import pytest
from bench.studies.inference import (
    CONTRADICTED,
    NOT_SHOWN,
    SHOWN,
    detectable,
    interval,
    power,
    t_cdf,
    t_quantile,
    verdict,
)


@pytest.mark.parametrize(
    # Of a printed table, two-sided 95 % and 90 %.
    ("degrees", "high", "less"),
    [
        (1, 12.7062, 6.3138),
        (2, 4.3027, 2.9200),
        (3, 3.1824, 2.3534),
        (4, 2.7764, 2.1318),
        (7, 2.3646, 1.8946),
        (9, 2.2622, 1.8331),
        (30, 2.0423, 1.6973),
    ],
)
def test_quantiles(degrees, high, less):
    assert t_quantile(0.975, degrees) == pytest.approx(high, abs=1e-4)
    assert t_quantile(0.95, degrees) == pytest.approx(less, abs=1e-4)
    assert t_quantile(0.025, degrees) == -t_quantile(0.975, degrees)
    assert t_cdf(t_quantile(0.9, degrees), degrees) == pytest.approx(0.9, abs=1e-12)


def test_distributions_with_closed_forms():
    # One degree of freedom is Cauchy's, two have a square root.
    for t in (-3.0, -0.5, 0.0, 0.2, 7.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)
    with pytest.raises(ValueError, match="degrees must be at least 1, got 0"):
        t_cdf(0.0, 0)
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\), got 1"):
        t_quantile(1, 3)


def test_interval_by_hand():
    # Mean -0.2, sample deviation 0.1, standard error 0.1 / sqrt(3), quantile 4.3027.
    found = interval([-0.3, -0.1, -0.2])
    half = 4.30265273 * 0.1 / math.sqrt(3)
    assert found.mean == pytest.approx(-0.2)
    assert found.low == pytest.approx(-0.2 - half) and found.high == pytest.approx(-0.2 + half)
    # Five values: mean 3, deviation sqrt(2.5), quantile 2.7764.
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.high - 3 == pytest.approx(2.77644511 * math.sqrt(2.5 / 5))
    assert interval([1.0]) == (1.0, -math.inf, math.inf)
    assert interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_three_verdicts():
    def said(values, bound=0.0, below=True):
        return verdict(interval(values), bound, below=below)

    # Three seeds at 3.5 standard errors: two of them would have been "shown".
    assert said([-0.3, -0.1, -0.2]) == NOT_SHOWN
    assert said([-0.3, -0.1, -0.2, -0.25, -0.15]) == SHOWN
    assert said([0.3, 0.1, 0.2, 0.25, 0.15]) == CONTRADICTED
    assert said([0.3, 0.1, 0.2, 0.25, 0.15], below=False) == SHOWN
    assert said([-0.3, -0.1, -0.2, -0.25, -0.15], below=False) == CONTRADICTED
    assert said([0.004, 0.003, 0.005, 0.004, 0.004], bound=0.01) == SHOWN
    assert said([-5.0]) == NOT_SHOWN
    assert said([0.0, 0.0, 0.0]) == NOT_SHOWN  # Equal is not below.


def test_power():
    # Published examples of the paired t-test, two-sided 5 %: an effect of half a deviation needs 34
    # pairs for 0.80, of 0.8 deviations 15, of one deviation 10.
    assert power(0.5, 1.0, 34) == pytest.approx(0.808, abs=2e-3)
    assert power(0.8, 1.0, 15) == pytest.approx(0.821, abs=2e-3)
    assert power(1.0, 1.0, 10) == pytest.approx(0.803, abs=2e-3)
    # Without an effect an interval lies on one side of the bound in 2.5 % of the tests.
    assert power(0.0, 1.0, 5) == pytest.approx(0.025, abs=1e-6)
    assert power(-1.0, 1.0, 5) < 1e-3 and power(10.0, 1.0, 5) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="seeds must be at least 2 and deviation above 0, got 1"):
        power(1.0, 1.0, 1)


def test_what_seeds_can_find():
    # The pairs of published examples, the other way round.
    assert detectable(15) == pytest.approx(0.78, abs=0.01)
    assert power(detectable(5), 1.0, 5) == pytest.approx(0.8, abs=2e-3)
    assert detectable(3) > detectable(5) > detectable(12)

"""Verdicts and tables of reports."""

from __future__ import annotations

import math

import pytest
from bench.studies.report import Claim, Report


def test_verdicts_are_computed():
    claim = Claim("lower", [-0.3, -0.1, -0.2], "nat")
    assert claim.mean == pytest.approx(-0.2)
    # Sample deviation 0.1 over sqrt(3); the quantile of two degrees of freedom is 4.3.
    assert claim.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert claim.verdict() == "not shown" and claim.said() == "not shown (3 seeds)"
    five = [-0.3, -0.1, -0.2, -0.25, -0.15]
    assert Claim("lower", five, "nat").said() == "shown"
    assert Claim("higher", five, "nat", below=False).said() == "contradicted"
    assert Claim("lower", [-5.0], "nat").said() == "not shown (1 seed)"
    three = [3.4, 3.6, 3.5, 3.45, 3.55]
    assert Claim("three times", three, "x", bound=3.0, below=False).verdict() == "shown"


def test_report_tables():
    report = Report("toy", {"Data": "bytes"}, ["loss", "MaxVio"])
    report.arms = {"dense": [[2.0, 0.0], [4.0, 0.0]], "sparse": [[1.0, 0.5], [2.0, 0.7]]}
    report.claims = [Claim("sparse is lower", [-1.0, -2.0], "nat")]
    text = report.markdown()
    assert "| arm | loss | MaxVio |" in text
    assert "| dense | 3 ± 1 | 0 ± 0 |" in text
    assert "| sparse is lower | -1.5 (-7.85 to 4.85) nat | 2 | < 0 | not shown (2 seeds) |" in text

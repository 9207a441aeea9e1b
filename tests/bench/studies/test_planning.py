"""Thin verdicts, and the seeds that a second study of them needs."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev

import numpy
import pytest
from bench.studies import planning

README = Path(planning.__file__).with_name("README.md")
# Student's t, two-sided 95 %, by degrees of freedom, as printed in tables of statistics.
QUANTILES = {4: 2.776445, 5: 2.570582, 6: 2.446912, 10: 2.228139, 11: 2.200985}


@pytest.mark.parametrize(("effect", "deviation"), [(1.26, 0.98), (0.0166, 0.0181)])
def test_seeds_needed_is_the_least_number_that_simulated_studies_need(effect, deviation):
    needed = planning.seeds_needed(effect, deviation)
    assert needed is not None
    random, studies = numpy.random.default_rng(0), 200_000

    def shown(seeds):
        values = random.normal(effect, deviation, (studies, seeds))
        half = QUANTILES[seeds - 1] * values.std(1, ddof=1) / seeds**0.5
        return (values.mean(1) > half).mean()

    # Six standard errors of a share of 0.8: 0.0054.
    assert shown(needed) > planning.CHANCE - 0.0054
    assert shown(needed - 1) < planning.CHANCE + 0.0054


def test_seeds_needed_without_end():
    assert planning.seeds_needed(1e-3, 1.0) is None
    assert planning.seeds_needed(100.0, 1.0) == 2


def test_thin_verdicts_have_the_effects_of_the_stored_results():
    found = {(t.study.name, t.claim.key): t for t in planning.thin()}
    thin = found["routing-balance", next(k for s, k in found if s == "routing-balance")]
    differences = thin.claim.differences
    assert len(differences) == thin.study.seeds
    half = QUANTILES[len(differences) - 1] * stdev(differences) / len(differences) ** 0.5
    distance = abs(fmean(differences) - thin.claim.bound)
    assert half < distance <= planning.THIN * half
    assert thin.effect == pytest.approx(distance)


def test_minutes_a_seed(tmp_path):
    study = planning.thin()[0].study
    seconds = {run: {"10": {"seconds": 60.0}, "11": {"seconds": 180.0}} for run in study.runs}
    (tmp_path / f"{study.name}.json").write_text(json.dumps({"runs": seconds}), "utf-8")
    assert planning.minutes_a_seed(study, tmp_path) == pytest.approx(2.0 * len(study.runs))


def test_the_readme_has_the_table_of_the_stored_results():
    assert README.read_text("utf-8").endswith(planning.table(planning.thin()) + "\n")

"""All verdicts of the zoo's pages, computed again from the stored results.

This shares no code with the studies: formulas.json has each claim's difference as arithmetic on the
stored numbers, and the intervals take printed quantiles.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "bench" / "studies" / "results"
FORMULAS = json.loads(Path(__file__).with_name("formulas.json").read_text("utf-8"))
PAGES = {path.stem: path.read_text("utf-8") for path in (ROOT / "docs" / "zoo").glob("*.md")}
# Student's t, two-sided 95 %, by degrees of freedom, as printed in tables of statistics.
QUANTILES = {
    4: 2.776445, 5: 2.570582, 7: 2.364624, 8: 2.306004, 9: 2.262157, 11: 2.200985, 14: 2.144787,
    15: 2.131450, 19: 2.093024, 23: 2.068658, 29: 2.045230, 39: 2.022691,
}  # fmt: skip
MARKS = {"●": "shown", "○": "not shown", "✕": "contradicted"}
MEASURED = re.compile(
    r"(?:([●○✕]) )?(\S+) \((\S+) to (\S+)\).*?, ([<>]) (\S+)\?, n (\d+)$"
)  # fmt: skip


def evaluated(formula, results, rows):
    names = {"x": lambda arm, column: rows[arm][column], "run": results.get, "max": max}
    return eval(formula, {"__builtins__": {}}, names)


def differences(stored, formula):
    """Returns the formula's value for each seed of the plan."""
    values = []
    for seed in map(str, stored["fixed"]["seeds"]):
        results = {run: found[seed] for run, found in stored["runs"].items()}
        rows = {arm: row for result in results.values() for arm, row in result["rows"].items()}
        values.append(evaluated(formula, results, rows))
    return values


def judged(low, high, side, bound):
    if low <= bound <= high:
        return "not shown"
    return "shown" if (high < bound) == (side == "<") else "contradicted"


def printed(study):
    """Returns the rows of a study's table of claims on its page, as cells."""
    text = PAGES[study.split("-")[0]]
    text = text[text.index(f"(study <code>{study}</code>)") :]
    text = text[text.index("| claim | measured, 95 % interval |") :]
    lines = text[: text.index("\n\n")].splitlines()[2:]
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.parametrize("study", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_claims_of_a_study(study):
    stored = json.loads((RESULTS / f"{study}.json").read_text("utf-8"))
    plan = stored["fixed"]["hypotheses"]
    rows = printed(study)
    assert len(rows) == len(FORMULAS[study])
    for i, (cells, (statement, formula)) in enumerate(zip(rows, FORMULAS[study], strict=True)):
        shown, measured, seeds, bound, verdict = cells
        later = shown.removesuffix(" (stated after the results)")
        assert later == statement and (later != shown) == (i >= len(plan)), shown
        if i < len(plan):
            planned = "<" if plan[i]["below"] else ">"
            assert plan[i]["statement"] == statement
            assert bound == f"{planned} {plan[i]['bound']:g}", statement
        values = differences(stored, formula)
        mean, n = fmean(values), len(values)
        assert int(seeds) == n == len(stored["fixed"]["seeds"])
        half = QUANTILES[n - 1] * stdev(values) / n**0.5
        side, limit = bound.split()
        assert verdict == judged(mean - half, mean + half, side, float(limit)), statement
        numbers = re.match(r"(\S+) \((\S+) to (\S+)\)", measured)
        expected = [f"{x:.3g}" for x in (mean, mean - half, mean + half)]
        for written, value in zip(numbers.groups(), expected, strict=True):
            # Printed quantiles have seven digits; differences of equal numbers may be -0.
            assert float(written) == pytest.approx(float(value), rel=1e-2, abs=1e-12), statement


@pytest.mark.parametrize("system", sorted({name.split("-")[0] for name in FORMULAS}))
def test_headlines_of_a_page(system):
    """Each verdict of the first tables follows from the last interval of its row, and each interval
    is one of the studies'."""
    page = PAGES[system].split("<!-- experiment -->")[1].split("<details>")[0]
    known = {
        tuple(re.match(r"(\S+) \((\S+) to (\S+)\)", row[1]).groups())
        for study in FORMULAS if study.split("-")[0] == system for row in printed(study)
    }  # fmt: skip
    checked = 0
    for line in page.splitlines():
        cells = line.strip("| ").split(" | ")
        verdicts = [cell.strip("*") for cell in cells if cell.startswith("**")]
        if not line.startswith("| ") or not verdicts:
            continue
        found = [match for cell in cells if (match := MEASURED.match(cell))]
        for mark, mean, low, high, side, bound, _ in (match.groups() for match in found):
            assert (mean, low, high) in known, line
            verdict = judged(float(low), float(high), side, float(bound))
            assert mark is None or MARKS[mark] == verdict, line
        if verdicts[0] not in ("not testable at this size", "not measured"):
            assert found and verdicts[0] == MARKS[found[-1][1]], line
        checked += 1
    assert checked


def test_every_stored_hypothesis_has_a_formula():
    plans = {
        path.stem: len(json.loads(path.read_text("utf-8"))["fixed"]["hypotheses"])
        for path in RESULTS.glob("*.json")
    }
    assert set(plans) == set(FORMULAS)
    declared = sum(plans.values())
    assert f"The studies declared {declared} hypotheses" in (ROOT / "docs" / "zoo.md").read_text()

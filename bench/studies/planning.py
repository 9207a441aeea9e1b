"""``python -m bench.studies power``: decided headlines whose interval ends close to their bound,
and how many fresh seeds a second study of each needs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from . import page, registry
from .inference import CONTRADICTED, SHOWN, power
from .queue import RESULTS
from .report import Claim
from .study import Study

# Distance of the mean from the bound, in half-widths of the interval: a decided claim has over 1.
THIN = 1.25
CHANCE = 0.8
MOST_SEEDS = 200


@dataclass(frozen=True)
class Thin:
    """A decided headline close to its bound.

    Attributes:
        study: the study that decides it.
        claim: its claim, with the stored differences.
        statement: of the headline.
        minutes: of processor time that all runs of one seed take, by the stored runs.
    """

    study: Study
    claim: Claim
    statement: str
    minutes: float

    @property
    def effect(self) -> float:
        """Returns the distance of the mean from the bound, in the claim's unit."""
        return abs(self.claim.mean - self.claim.bound)

    @property
    def seeds(self) -> int | None:
        """Returns how many fresh seeds decide it again, see `seeds_needed`."""
        return seeds_needed(self.effect, stdev(self.claim.differences))


def seeds_needed(effect: float, deviation: float, chance: float = CHANCE) -> int | None:
    """Returns the least number of seeds with which the verdict is reached with at least `chance`,
    None if that takes more than `MOST_SEEDS`.

    Args:
        effect: distance of the true mean from the bound.
        deviation: standard deviation of one seed's difference, above 0.
        chance: between 0 and 1.
    """
    if power(effect, deviation, MOST_SEEDS) < chance:
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, deviation, middle) >= chance else (middle, high)
    return high


def thin(results: Path = RESULTS) -> list[Thin]:
    """Returns the thin verdicts of all systems, those with the fewest half-widths first."""
    found = []
    for system in registry.NAMES:
        experiment = registry.experiment(system)
        reports = page.reports_of(experiment, results)
        for headline in experiment.headlines:
            claim = page.deciding(headline, experiment, reports)
            if claim is None or headline.verdict(claim) not in (SHOWN, CONTRADICTED):
                continue
            if half_widths(claim) > THIN:
                continue
            study = next(
                s for s, report in zip(experiment.studies, reports, strict=True)
                if report is not None and any(c is claim for c in report.claims)
            )  # fmt: skip
            minutes = minutes_a_seed(study, results)
            found.append(Thin(study, claim, headline.statement, minutes))
    return sorted(found, key=lambda t: half_widths(t.claim))


def half_widths(claim: Claim) -> float:
    """Returns the distance of the mean from the bound over half the width of the interval."""
    mean, low, high = claim.interval
    return abs(mean - claim.bound) / ((high - low) / 2) if high > low else math.inf


def minutes_a_seed(study: Study, results: Path = RESULTS) -> float:
    """Returns the mean minutes of processor time of a run, summed over the study's runs."""
    stored = json.loads((results / f"{study.name}.json").read_text("utf-8"))["runs"]
    return sum(fmean(r["seconds"] for r in stored[run].values()) for run in study.runs) / 60


def table(found: Sequence[Thin]) -> str:
    """Returns the table, in Markdown."""
    titles = (
        "study", "headline", "verdict", "effect", "standard error", "seeds", "seeds needed",
        "minutes",
    )  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for t in found:
        needed = t.seeds
        cells = [
            f"`{t.study.name}`",
            t.statement,
            t.claim.verdict(),
            f"{t.effect:.3g} {t.claim.unit}",
            f"{t.claim.standard_error:.2g}",
            str(len(t.claim.differences)),
            f"over {MOST_SEEDS}" if needed is None else str(needed),
            "–" if needed is None else f"{needed * t.minutes:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies power",
        description=f"Prints the decided headlines whose mean is within {THIN} half-widths of its "
        "bound: distance from the bound, standard error, seeds done, fresh seeds with which a "
        f"second study reaches the verdict with a chance of {CHANCE}, and their processor time.",
    )
    parser.parse_args(arguments)
    print(table(thin()))
    return 0

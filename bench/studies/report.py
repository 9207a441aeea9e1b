"""The report of an experiment: numbers of each arm and seed, and verdicts computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

from .inference import Interval, interval, verdict
from .picture import Picture

# Fewer say something about the spread of seeds only by way of the quantile.
MIN_SEEDS = 5


@dataclass(frozen=True)
class Claim:
    """A statement about a difference, one number per seed.

    Attributes:
        statement: what should hold, in a sentence.
        differences: one per seed, in `unit`: what the statement is about, for instance the loss of
            one arm minus that of another with the same seed.
        unit: of the differences.
        bound: what the difference is compared with.
        below: the claim is that the difference is below the bound; False: above.
        key: of the system's headline that this decides; "" for none.
    """

    statement: str
    differences: Sequence[float]
    unit: str
    bound: float = 0.0
    below: bool = True
    key: str = ""

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences)

    @property
    def standard_error(self) -> float:
        """Returns the standard error of the mean, from the spread over seeds; infinite with fewer
        than two of them."""
        n = len(self.differences)
        return stdev(self.differences) / math.sqrt(n) if n > 1 else math.inf

    @property
    def interval(self) -> Interval:
        return interval(self.differences)

    def verdict(self) -> str:
        """ "shown", "not shown" or "contradicted"; see `inference.verdict`."""
        return verdict(self.interval, self.bound, below=self.below)

    def said(self) -> str:
        """The verdict, with the number of seeds where that is small."""
        n = len(self.differences)
        return self.verdict() + (f" ({n} seed{'s' * (n > 1)})" if n < MIN_SEEDS else "")


@dataclass
class Report:
    """A run of an experiment.

    Attributes:
        system: its name in the zoo.
        setting: data, sizes, steps, machine: what a reader needs to run it again.
        columns: headings of the table's numbers.
        arms: name of an arm -> one row of numbers per seed; None where an arm has no such number.
        claims: what is concluded.
        pictures: what is to be drawn.
        title: of this run among those of the system; "" where it is the only one.
        fixed: what was fixed before the numbers were looked at, a sentence each.
    """

    system: str
    setting: dict[str, Any]
    columns: Sequence[str]
    arms: dict[str, list[Sequence[float | None]]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    title: str = ""
    fixed: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Tables for docs/zoo: mean ± standard error of each arm, claims with intervals."""
        lines = [f"### {self.title}", ""] if self.title else []
        lines += [f"- {name}: {value}." for name, value in self.setting.items()]
        if self.fixed:
            lines += ["", "Fixed before the test:", "", *(f"- {line}." for line in self.fixed)]
        lines += [
            "",
            "| arm | " + " | ".join(self.columns) + " |",
            "|---" * (len(self.columns) + 1),
        ]
        lines[-1] += "|"
        for arm, rows in self.arms.items():
            cells = [_cell([row[i] for row in rows]) for i in range(len(self.columns))]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines += ["", "| claim | measured, 95 % interval | seeds | bound | verdict |"]
        lines += ["|---|---|---|---|---|"]
        for claim in self.claims:
            side = "<" if claim.below else ">"
            cells = [claim.statement, measured(claim), str(len(claim.differences))]
            cells += [f"{side} {claim.bound:g}", claim.said()]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def gaps(
    arms: Mapping[str, Sequence[Sequence[float | None]]],
    a: str,
    b: str,
    i: int,
    j: int | None = None,
) -> list[float]:
    """Column i of arm a minus column j (None: i) of arm b, one per seed; both have all numbers."""

    def column(arm: str, of: int) -> list[float]:
        return [x for row in arms[arm] if (x := row[of]) is not None]

    pairs = zip(column(a, i), column(b, i if j is None else j), strict=True)
    return [x - y for x, y in pairs]


def means(x: Sequence[Any], values: Sequence[Sequence[float]]) -> dict[str, list[Any]]:
    """A series of a picture: at each x the mean over seeds of its values and the standard error,
    0 where there is one value and so no bar to draw."""
    found = [Claim("", v, "") for v in values]
    errors = [c.standard_error if len(c.differences) > 1 else 0.0 for c in found]
    return {"x": list(x), "y": [c.mean for c in found], "error": errors}


def measured(claim: Claim) -> str:
    """Mean and interval with the unit."""
    mean, low, high = claim.interval
    ends = f" ({low:.3g} to {high:.3g})" if math.isfinite(low) else ""
    return f"{mean:.3g}{ends} {claim.unit}".rstrip()


def _cell(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return _mean_and_error(numbers) if len(numbers) == len(values) else "–"


def _mean_and_error(values: Sequence[float]) -> str:
    claim = Claim("", values, "")
    if math.isinf(claim.standard_error):
        return f"{claim.mean:.4g}"
    return f"{claim.mean:.4g} ± {claim.standard_error:.2g}"

"""What an experiment reports: numbers of each arm and seed, and verdicts computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_ops._files import write_text

from .picture import Picture

# A difference counts when it is further from the bound than this many standard errors.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Claim:
    """A statement about a difference, one number a seed.

    Attributes:
        statement: what should hold, in a sentence.
        differences: one a seed, in `unit`: what the statement is about, for instance the loss of
            one arm minus that of another with the same seed.
        unit: of the differences.
        bound: what the difference is compared with.
        below: the claim is that the difference is below the bound; False: above.
    """

    statement: str
    differences: Sequence[float]
    unit: str
    bound: float = 0.0
    below: bool = True

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences)

    @property
    def standard_error(self) -> float:
        """Of the mean, from the spread over seeds; infinite with fewer than two of them."""
        n = len(self.differences)
        if n < 2:
            return math.inf
        variance = sum((d - self.mean) ** 2 for d in self.differences) / (n - 1)
        return math.sqrt(variance / n)

    @property
    def shown(self) -> bool:
        """Whether mean and bound are more than two standard errors apart, on the claimed side."""
        distance = self.bound - self.mean if self.below else self.mean - self.bound
        return distance > STANDARD_ERRORS * self.standard_error

    def verdict(self) -> str:
        return "shown" if self.shown else "not shown at this size"


@dataclass
class Report:
    """A run of an experiment.

    Attributes:
        system: its name in the zoo.
        setting: data, sizes, steps, machine: what a reader needs to run it again.
        columns: headings of the table's numbers.
        arms: name of an arm -> one row of numbers a seed; None where an arm has no such number.
        claims: what is concluded.
        pictures: what is to be drawn.
    """

    system: str
    setting: dict[str, Any]
    columns: Sequence[str]
    arms: dict[str, list[Sequence[float | None]]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def markdown(self) -> str:
        """Tables for docs/zoo: mean ± standard error of each arm, then the claims."""
        lines = [f"- {name}: {value}." for name, value in self.setting.items()]
        lines += [
            "",
            "| arm | " + " | ".join(self.columns) + " |",
            "|---" * (len(self.columns) + 1),
        ]
        lines[-1] += "|"
        for arm, rows in self.arms.items():
            cells = [_cell([row[i] for row in rows]) for i in range(len(self.columns))]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines += ["", "| claim | measured | bound | verdict |", "|---|---|---|---|"]
        for claim in self.claims:
            side = "<" if claim.below else ">"
            measured = f"{_mean_and_error(claim.differences)} {claim.unit}"
            lines.append(
                f"| {claim.statement} | {measured} | {side} {claim.bound:g} | {claim.verdict()} |"
            )
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, ready for JSON."""
        return {
            "system": self.system,
            "setting": dict(self.setting),
            "columns": list(self.columns),
            "arms": {arm: [list(row) for row in rows] for arm, rows in self.arms.items()},
            "claims": [
                {
                    "statement": c.statement,
                    "unit": c.unit,
                    "differences": list(c.differences),
                    "mean": c.mean,
                    "standard_error": None if math.isinf(c.standard_error) else c.standard_error,
                    "bound": c.bound,
                    "below": c.below,
                    "verdict": c.verdict(),
                }
                for c in self.claims
            ],
            "pictures": [picture.to_dict() for picture in self.pictures],
        }

    def write(self, path: Path) -> None:
        """As JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """What `to_dict` gave."""
        kept = ("statement", "differences", "unit", "bound", "below")
        return cls(
            data["system"],
            dict(data["setting"]),
            data["columns"],
            dict(data["arms"]),
            [Claim(**{name: claim[name] for name in kept}) for claim in data["claims"]],
            [Picture(**picture) for picture in data["pictures"]],
        )


def gaps(
    arms: Mapping[str, Sequence[Sequence[float | None]]],
    a: str,
    b: str,
    i: int,
    j: int | None = None,
) -> list[float]:
    """Column i of arm a minus column j (None: i) of arm b, one a seed; both have all numbers."""

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


def _cell(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return _mean_and_error(numbers) if len(numbers) == len(values) else "–"


def _mean_and_error(values: Sequence[float]) -> str:
    claim = Claim("", values, "")
    if math.isinf(claim.standard_error):
        return f"{claim.mean:.4g}"
    return f"{claim.mean:.4g} ± {claim.standard_error:.2g}"

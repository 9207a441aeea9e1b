"""Studies: what is run, what is claimed of it before it is run, and what the runs make of that.

An `Experiment` is what a system of the zoo has: one `Study` a size or setting, smallest first, and
the headlines that the studies decide. A study is made of runs, each of one name and one seed, that
are independent of each other: they can be run side by side, cut, and gone on with. Runs that are
compared share seed, data and data order, and what is compared is the difference within a seed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_ops._files import make_folder
from moe_ops._state import read_state, write_state

from .inference import CONTRADICTED, NOT_SHOWN, NOT_TESTABLE, SHOWN, power
from .picture import Picture
from .report import Claim, Report

# State of a claim that this size could decide, without a stored result that does.
NOT_MEASURED = "not measured"
# Smaller ones are for pilots: settings may be chosen by them, and no test uses them.
FIRST_SEED = 10
SECONDS_BETWEEN_SAVES = 120.0
SECONDS_BETWEEN_LINES = 30.0

Job = Callable[[int, "Run"], dict[str, Any]]


class Paused(Exception):
    """The time is over; the run goes on from its checkpoint when it is started again."""


@dataclass
class Run:
    """Facts that a job is told about its run.

    Attributes:
        checkpoint: the file of its state; None: it is kept nowhere.
        deadline: on `time.monotonic`, when it must stop.
        tell: called now and then, with the share done and the seconds left.
        parent: the process that waits for the result; the run stops when that one has ended.
        every: seconds between two saves.
        whole: the run that this one is a part of, see `part`.
    """

    checkpoint: Path | None = None
    deadline: float = float("inf")
    tell: Callable[[float, float], None] = lambda share, left: None
    parent: int | None = None
    every: float = SECONDS_BETWEEN_SAVES
    whole: Run | None = None
    spent: float = 0.0
    _began: float = field(default_factory=time.process_time)
    _saved: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)
    _first: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        """Returns the seconds of processor time, including those before a pause."""
        return self.spent + time.process_time() - self._began

    def load(self) -> dict[str, Any] | None:
        """The state that was saved, None where there is none."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return None
        saved = read_state(self.checkpoint)
        self.spent = saved["seconds"]
        if self.whole is not None:
            self.whole.spent += self.spent
        return saved["state"]

    def part(self, name: str) -> Run:
        """One of several trainings of this run; its last state is kept, so that a run that goes on
        does not repeat it."""
        path = self.checkpoint.with_suffix(f".{name}.pt") if self.checkpoint else None
        return Run(path, self.deadline, self.tell, self.parent, self.every, self)

    def clear(self) -> None:
        """Removes what was saved."""
        if self.checkpoint is not None:
            for path in self.checkpoint.parent.glob(f"{self.checkpoint.stem}.*"):
                path.unlink()

    def step(self, done: int, total: int, state: Callable[[], dict[str, Any]]) -> None:
        """Says that `done` of `total` steps are done; `state` gives all that going on needs.

        Raises:
            Paused: after the state was saved.
        """
        now = time.monotonic()
        orphan = self.parent is not None and os.getppid() != self.parent
        over = now >= self.deadline or orphan
        due = now - self._saved >= self.every or (done == total and self.whole is not None)
        if self.checkpoint is not None and (over or due):
            make_folder(self.checkpoint.parent)
            write_state(self.checkpoint, {"state": state(), "seconds": self.seconds})
            self._saved = now
        if over:
            raise Paused
        first, began = self._first = self._first or (done, now)
        if now - self._told >= SECONDS_BETWEEN_LINES and done > first:
            self.tell(done / total, (now - began) / (done - first) * (total - done))
            self._told = now


@dataclass(frozen=True)
class Results:
    """The results of the runs of a study: name of a run -> seed -> its result, for the seeds of
    which all runs are there.

    A result has "rows": arm -> column -> number, or None where an arm has no such number. What else
    it has is the study's matter.
    """

    runs: Mapping[str, Mapping[int, Mapping[str, Any]]]
    seeds: Sequence[int]

    def every(self, run: str, name: str) -> list[Any]:
        """Returns what the run's results have under that name, by seed."""
        return [self.runs[run][seed][name] for seed in self.seeds]

    def arms(self) -> dict[str, list[Mapping[str, float | None]]]:
        found: dict[str, list[Mapping[str, float | None]]] = {}
        for run in self.runs:
            for rows in self.every(run, "rows"):
                for arm, row in rows.items():
                    found.setdefault(arm, []).append(row)
        return found

    def of(self, arm: str, column: str) -> list[float]:
        """A column of an arm, by seed."""
        values = [row[column] for row in self.arms()[arm]]
        return [value for value in values if value is not None]

    def gap(self, a: str, b: str, column: str, other: str = "") -> list[float]:
        """A column of arm a minus the same, or another, of arm b, by seed."""
        pairs = zip(self.of(a, column), self.of(b, other or column), strict=True)
        return [x - y for x, y in pairs]


@dataclass(frozen=True)
class Hypothesis:
    """A claim before its numbers are known.

    Attributes:
        statement, unit, bound, below, key: see `report.Claim`.
        of: the differences, one per seed.
        expected: their mean, and `deviation` that of a single one, by the pilot; None without one.
        pilot: what the two were taken from.
    """

    statement: str
    of: Callable[[Results], list[float]]
    unit: str
    bound: float = 0.0
    below: bool = True
    key: str = ""
    expected: float | None = None
    deviation: float | None = None
    pilot: str = ""

    def claim(self, results: Results) -> Claim:
        differences = self.of(results)
        return Claim(self.statement, differences, self.unit, self.bound, self.below, self.key)

    def power(self, seeds: int) -> float | None:
        """The chance that it is shown if the pilot's numbers are the true ones."""
        if self.expected is None or self.deviation is None:
            return None
        effect = self.bound - self.expected if self.below else self.expected - self.bound
        return power(effect, self.deviation, seeds)

    def fixed(self, seeds: int) -> dict[str, Any]:
        """Returns the hypothesis as JSON, for the file of the results."""
        found: dict[str, Any] = {
            "statement": self.statement,
            "unit": self.unit,
            "bound": self.bound,
            "below": self.below,
        }
        chance = self.power(seeds)
        if chance is not None:
            found.update(expected=self.expected, deviation=self.deviation, pilot=self.pilot)
            found["power"] = round(chance, 3)
        return found


def no_pictures(results: Results) -> list[Picture]:
    return []


@dataclass(frozen=True)
class Study:
    """One size or setting of an experiment.

    Attributes:
        name: unique, of the file of its results: begins with the system's.
        size: how it is called in tables, short.
        rank: its place in the queue, small first: from 10 on studies that pilots promise to decide
            headlines, those with the most of them a minute first; from 30 on those without a pilot
            and those that add a size to what is decided; from 50 on those of an hour and more.
        runs: name -> job.
        seeds: how many, from `first_seed` on.
        minutes: of processor time a run, roughly: for the time left before any run is done.
        hypotheses: what is claimed.
        setting: what a reader needs to know of it.
        pictures: what is drawn of the results.
        first_seed: above those of an earlier study of the same setting that is this one's pilot.
        later: claims that were stated after the results: they are no part of the plan.
        repeats: the earlier study whose results on the same seeds were known, or "".
    """

    name: str
    size: str
    rank: int
    runs: Mapping[str, Job]
    seeds: int
    minutes: float
    hypotheses: Sequence[Hypothesis]
    setting: Callable[[], dict[str, str]]
    pictures: Callable[[Results], list[Picture]] = no_pictures
    first_seed: int = FIRST_SEED
    later: Sequence[Hypothesis] = ()
    repeats: str = ""

    @property
    def keys(self) -> set[str]:
        """Returns the keys of the headlines about which the study has a claim."""
        return {h.key for h in (*self.hypotheses, *self.later) if h.key}

    @property
    def numbers(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def fixed(self) -> dict[str, Any]:
        """Returns what must not change once there are results."""
        return {
            "seeds": list(self.numbers),
            "setting": self.setting(),
            "hypotheses": [h.fixed(self.seeds) for h in self.hypotheses],
        }

    def report(self, system: str, stored: Mapping[str, Any]) -> Report | None:
        """Returns the report of a file of results; None as long as no seed has all its runs."""
        runs = {
            name: {int(seed): result for seed, result in stored["runs"].get(name, {}).items()}
            for name in self.runs
        }
        seeds = [s for s in self.numbers if all(s in found for found in runs.values())]
        if not seeds:
            return None
        results = Results(runs, seeds)
        arms = results.arms()
        columns: dict[str, None] = {}
        for rows in arms.values():
            columns.update(dict.fromkeys(rows[0]))
        minutes = sum(r["seconds"] for found in runs.values() for r in found.values()) / 60
        spent = "less than a minute" if minutes < 1 else f"{minutes:.0f} min"
        setting = {**self.setting(), "Machine": f"{stored['machine']}; {spent} of it"}
        return Report(
            system,
            setting,
            list(columns),
            {arm: [[row.get(c) for c in columns] for row in rows] for arm, rows in arms.items()},
            [
                *(h.claim(results) for h in self.hypotheses),
                *(
                    replace(c, statement=f"{c.statement} (stated after the results)")
                    for c in (h.claim(results) for h in self.later)
                ),
            ],
            self.pictures(results),
            self.size,
            self._said(stored["fixed"], len(seeds)),
        )

    def _said(self, fixed: Mapping[str, Any], done: int) -> list[str]:
        seeds = fixed["seeds"]
        known = "which no pilot used"
        if self.repeats:
            known = (
                f"on which the results of study `{self.repeats}` were known when this study was "
                "planned"
            )
        lines = [
            f"settings, claims, bounds, and seeds {seeds[0]} to {seeds[-1]}, {known}"
            + (f"; {done} of {len(seeds)} are done" if done < len(seeds) else "")
        ]
        for h in fixed["hypotheses"]:
            if "power" not in h:
                continue
            beyond = h["expected"] - h["bound"]
            does, chance = "show", h["power"]
            if (beyond < 0) != h["below"]:
                does, chance = "contradict", power(abs(beyond), h["deviation"], len(seeds))
            lines.append(
                f"{h['statement']}: by {h['pilot']}, {h['expected']:.3g} with a deviation of "
                f"{h['deviation']:.2g} a seed, so that {len(seeds)} seeds {does} it with a chance "
                f"of {chance:.2f}"
            )
        return lines


@dataclass(frozen=True)
class Headline:
    """One of the claims that a system's page leads with.

    Attributes:
        key: of the hypotheses that decide it.
        statement: in a few words.
        published: what the authors report; only measured figures have digits.
        kind: "quality", "mechanism" or "cost": a column of the table of all systems.
        shown, contradicted, not_shown: what the result is put down to, should it be this one; ""
            where nothing is known.
        untestable: what the studies lack to test this claim, and what would test it; the verdict
            is then NOT_TESTABLE, whatever the differences are.
    """

    key: str
    statement: str
    published: str
    kind: str
    shown: str = ""
    contradicted: str = ""
    not_shown: str = ""
    untestable: str = ""

    @property
    def has_figure(self) -> bool:
        """True if the authors report a figure."""
        return any(c.isdigit() for c in self.published)

    def verdict(self, claim: Claim) -> str:
        """Returns the verdict, given the claim of the study that decides."""
        return NOT_TESTABLE if self.untestable else claim.verdict()

    def why(self, verdict: str) -> str:
        """The reason that goes with the verdict."""
        return {
            SHOWN: self.shown, CONTRADICTED: self.contradicted, NOT_SHOWN: self.not_shown,
            NOT_TESTABLE: self.untestable,
        }[verdict]  # fmt: skip


@dataclass(frozen=True)
class Abstract:
    """Claim of a paper's abstract: the first rows of a system's page.

    Attributes:
        statement: the claim, with its metric and baseline.
        published: the figure, "–" for none.
        key: of the studies' claim about this metric and baseline; "" for none.
        bound: replaces the bound of that claim; None keeps it.
        state: NOT_TESTABLE or NOT_MEASURED if no stored result decides, "" otherwise.
        why: the reason for `state` and the experiment that would decide, or what limits the result.
    """

    statement: str
    published: str
    key: str = ""
    bound: float | None = None
    state: str = ""
    why: str = ""


@dataclass(frozen=True)
class Experiment:
    """All that is put to the test about one system."""

    system: str
    studies: Sequence[Study]
    headlines: Sequence[Headline]

"""The parts of docs that the experiments make: ``python -m bench.studies --pages``.

The results of all runs lie in bench/studies/results, a file a study. Of them come, between two
marks, the tables of docs/zoo/<system>.md and the table of all systems in docs/zoo.md, and the
pictures beside the pages.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moe_ops._files import write_text

from . import registry
from .abstracts import ABSTRACTS
from .inference import CONTRADICTED, NOT_SHOWN, NOT_TESTABLE, SHOWN, detectable
from .picture import Picture
from .queue import RESULTS
from .report import Claim, Report, measured
from .study import NOT_MEASURED, Abstract, Experiment, Headline, Hypothesis, Study

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "zoo"
OVERVIEW = ROOT / "docs" / "zoo.md"
BEGIN, END = "<!-- experiment -->", "<!-- /experiment -->"
KINDS = ("quality", "mechanism", "cost")
MOST_COLUMNS = 3
NOT_RUN = "not run so far"
MARKS = {
    SHOWN: "●", NOT_SHOWN: "○", CONTRADICTED: "✕", NOT_TESTABLE: "□", NOT_MEASURED: "–",
    NOT_RUN: "–",
}  # fmt: skip


def write(results: Path = RESULTS, pages: Path = PAGES, overview: Path = OVERVIEW) -> list[Path]:
    """Writes every page and picture anew; returns the paths.

    Raises:
        ValueError: a page without the two marks, each on a line of its own.
    """
    written = []
    titles = ("system", "claims of the abstract", *(f"studies: {kind}" for kind in KINDS))
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for system in registry.NAMES:
        found = registry.experiment(system)
        made, drawn = body(found, results)
        for picture in drawn:
            path = pages / f"{system}-{picture.name}.svg"
            picture.draw(path)
            written.append(path)
        written.append(fill(pages / f"{system}.md", made))
        rows.append(f"| [{system}](zoo/{system}.md) | {' | '.join(cells(found, results))} |")
    written.append(fill(overview, "\n".join([counted(results), "", *rows])))
    return written


def fill(page: Path, text: str) -> Path:
    """Puts the text between the page's marks."""
    lines = page.read_text("utf-8").splitlines() if page.is_file() else []
    if lines.count(BEGIN) != 1 or lines.count(END) != 1:
        raise ValueError(f"{page} must have one line {BEGIN} and one {END}.")
    begin, end = lines.index(BEGIN), lines.index(END)
    write_text(page, "\n".join([*lines[: begin + 1], text, *lines[end:]]) + "\n")
    return page


def body(found: Experiment, results: Path = RESULTS) -> tuple[str, list[Picture]]:
    """Returns the text between the marks of a system's page, and its pictures."""
    reports = reports_of(found, results)
    parts, drawn = [], trends(found, reports)
    if found.system in ABSTRACTS:
        parts += ["Claims of the abstract:", abstracts(found, reports)]
        parts += ["What the studies test, at their sizes:"]
    parts.append(headlines(found, reports))
    drawn += last_pictures(found, reports)
    parts += [f"![{p.title}]({found.system}-{p.name}.svg)" for p in drawn]
    pairs = list(zip(found.studies, reports, strict=True))
    parts += [folded(study, report) for study, report in pairs if report is not None]
    missing = [f"`{study.name}` ({study.size})" for study, report in pairs if report is None]
    if missing:
        parts.append(f"Not run so far: {', '.join(missing)}.")
    return "\n\n".join(parts), drawn


def folded(study: Study, report: Report) -> str:
    """The numbers of a study, under a line that unfolds them: a heading in there would end it."""
    text = replace(report, title="").markdown().rstrip()
    summary = f"<summary>Numbers: {study.size} (study <code>{study.name}</code>)</summary>"
    return f"<details>\n{summary}\n\n{text}\n\n</details>"


def reports_of(found: Experiment, results: Path = RESULTS) -> list[Report | None]:
    """One a study, None where no seed has been run."""
    reports: list[Report | None] = []
    for study in found.studies:
        path = results / f"{study.name}.json"
        stored = json.loads(path.read_text("utf-8")) if path.is_file() else None
        reports.append(study.report(found.system, stored) if stored else None)
    return reports


def claims_of(headline: Headline, reports: Sequence[Report | None]) -> list[Claim | None]:
    """Returns each study's claim about the headline, None where it has none."""
    return [
        next((c for c in report.claims if c.key == headline.key), None) if report else None
        for report in reports
    ]


def deciding(
    headline: Headline, found: Experiment, reports: Sequence[Report | None]
) -> Claim | None:
    """The claim of the largest study whose seeds are all done.

    A study of which a part is done decides nothing: who looks again after each seed finds at some
    time what he looks for.
    """
    whole = done(headline, found, reports)
    return whole[-1] if whole else None


def promise(study: Study, hypothesis: Hypothesis) -> str:
    """The chances by the plan's pilot."""
    opposite = replace(hypothesis, below=not hypothesis.below)
    shown, contradicted = (h.power(study.seeds) or 0.0 for h in (hypothesis, opposite))
    return (
        f"by a pilot, {study.size}: shown with a chance of {shown:.2f}, contradicted with one of "
        f"{contradicted:.2f}"
    )


def done(headline: Headline, found: Experiment, reports: Sequence[Report | None]) -> list[Claim]:
    """Returns the claims of the studies whose seeds are all done, in the order of the studies."""
    pairs = zip(found.studies, claims_of(headline, reports), strict=True)
    return [c for s, c in pairs if c is not None and is_done(s, c)]


def is_done(study: Study, claim: Claim) -> bool:
    """Returns whether all seeds of the study are in its claim."""
    return len(claim.differences) == study.seeds


def abstracts(found: Experiment, reports: Sequence[Report | None]) -> str:
    """The table of the abstract's claims: published, measured, verdict, why."""
    lines = ["| claim | published | measured | verdict | why |", "|---" * 5 + "|"]
    for claim in ABSTRACTS[found.system]:
        found_claim = evidence(claim, found, reports)
        cells = [
            claim.statement,
            claim.published,
            cell(found_claim, marked=not claim.state) if found_claim else "–",
            f"**{verdict_of(claim, found, reports)}**",
            claim.why or "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def evidence(claim: Abstract, found: Experiment, reports: Sequence[Report | None]) -> Claim | None:
    """Returns the studies' claim with the key and bound of the abstract's, None without one."""
    if not claim.key:
        return None
    headline = Headline(claim.key, claim.statement, claim.published, "")
    decided = deciding(headline, found, reports)
    if decided is None or claim.bound is None:
        return decided
    return replace(decided, bound=claim.bound)


def verdict_of(claim: Abstract, found: Experiment, reports: Sequence[Report | None]) -> str:
    """Returns the state of the abstract's claim, or the verdict that the stored results give."""
    decided = evidence(claim, found, reports)
    return claim.state or (decided.verdict() if decided else NOT_RUN)


def said(headline: Headline, decided: Claim) -> str:
    """Returns the verdict, with the number of seeds if that is small."""
    verdict = headline.verdict(decided)
    return verdict if verdict == NOT_TESTABLE else decided.said()


def headlines(found: Experiment, reports: Sequence[Report | None]) -> str:
    """The table that a page leads with: claim, published, ours by size, verdict, why."""
    of_all = {h: claims_of(h, reports) for h in found.headlines}
    # Only studies that decide a headline have a column.
    shown = [
        i
        for i, study in enumerate(found.studies)
        if any(h.key in study.keys for h in found.headlines)
    ]
    names = [found.studies[i].size for i in shown]
    plans = {h: [i for i in shown if h.key in found.studies[i].keys] for h in found.headlines}
    # Studies of different things, none of which says anything about another's, share a column.
    apart = len(shown) > MOST_COLUMNS and all(len(plan) == 1 for plan in plans.values())
    if apart:
        names = ["measured"]
    lines = [f"| claim | published | {' | '.join(names)} | verdict | why |"]
    lines.append("|---" * (4 + len(names)) + "|")
    for headline, claims in of_all.items():
        cells = [headline.statement, headline.published]
        for i in plans[headline] if apart else shown:
            claim = claims[i]
            planned = headline.key in found.studies[i].keys
            marked = not headline.untestable
            cells.append(cell(claim, marked) if claim else "to be run" if planned else "–")
        decided = deciding(headline, found, reports)
        cells.append(f"**{said(headline, decided)}**" if decided else "open")
        cells.append(why(headline, found, decided) or "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def why(headline: Headline, found: Experiment, decided: Claim | None) -> str:
    """Returns the explanation of the result; of one that is not shown also how much its seeds could
    have found; of one that is open what a pilot promises."""
    if decided is None:
        for study in found.studies:
            for hypothesis in study.hypotheses:
                if hypothesis.key == headline.key and hypothesis.power(study.seeds) is not None:
                    return promise(study, hypothesis)
        return "no run and no pilot so far"
    reasons = [headline.why(headline.verdict(decided))]
    n = len(decided.differences)
    deviation = decided.standard_error * math.sqrt(n)
    if headline.verdict(decided) == NOT_SHOWN and n > 1 and deviation:
        distance = decided.mean - decided.bound
        side = "claimed" if (distance < 0) == decided.below else "other"
        reasons.append(
            f"the mean is {abs(distance):.2g} on the {side} side of the bound, and {n} seeds with "
            f"this spread find {detectable(n) * deviation:.2g} four times in five"
        )
    return "; ".join(reason for reason in reasons if reason)


def cell(claim: Claim, marked: bool = True) -> str:
    """Returns the measured difference, its bound and its seeds; marked: behind the verdict's
    mark."""
    side = "<" if claim.below else ">"
    mark = f"{MARKS[claim.verdict()]} " * marked
    return f"{mark}{measured(claim)}, {side} {claim.bound:g}?, n {len(claim.differences)}"


def cells(found: Experiment, results: Path = RESULTS) -> Iterator[str]:
    """A row of the table of all systems: claims of its abstract, then its headlines by kind, with
    their verdicts, and those of all studies that are done where they differ."""
    reports = reports_of(found, results)
    claims = ABSTRACTS.get(found.system, ())
    yield (
        "<br>".join(
            f"{MARKS[verdict_of(claim, found, reports)]} {claim.statement}" for claim in claims
        )
        or "–"
    )
    for kind in KINDS:
        said = []
        for headline in (h for h in found.headlines if h.kind == kind):
            decided = deciding(headline, found, reports)
            mark = MARKS[headline.verdict(decided) if decided else NOT_RUN]
            every = [MARKS[claim.verdict()] for claim in done(headline, found, reports)]
            differ = len(set(every)) > 1 and not headline.untestable
            by_study = f" ({' '.join(every)} by study)" if differ else ""
            said.append(f"{mark} {headline.statement}{by_study}")
        yield "<br>".join(said) or "–"


def states(found: Experiment, results: Path = RESULTS) -> Iterator[str]:
    """The verdict of each headline."""
    reports = reports_of(found, results)
    for headline in found.headlines:
        decided = deciding(headline, found, reports)
        yield headline.verdict(decided) if decided else NOT_RUN


def counted(results: Path = RESULTS) -> str:
    """The paragraph above the table of all systems: numbers of hypotheses, headlines and claims of
    abstracts, with verdicts."""
    every = [registry.experiment(system) for system in registry.NAMES]
    run = [s for found in every for s in found.studies if (results / f"{s.name}.json").is_file()]
    declared = sum(len(study.hypotheses) for study in run)
    published = sum(headline.has_figure for found in every for headline in found.headlines)
    by_headline = Counter(state for found in every for state in states(found, results))
    by_abstract: Counter[str] = Counter()
    for found in every:
        reports = reports_of(found, results)
        by_abstract.update(
            verdict_of(claim, found, reports) for claim in ABSTRACTS.get(found.system, ())
        )
    return (
        f"The studies declared {declared} hypotheses before their runs. "
        f"{by_headline.total()} headlines stand in the tables: {_listed(by_headline)}. Of these "
        f"headlines, {published} have a published figure beside them. The abstracts of "
        f"{len(ABSTRACTS)} models and methods make {by_abstract.total()} claims: "
        f"{_listed(by_abstract)}."
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[state]} {state}" for state in MARKS if counts.get(state))


def trends(found: Experiment, reports: Sequence[Report | None]) -> list[Picture]:
    """For each headline that several studies have: the mean by study, with its interval."""
    by_unit: dict[str, dict[str, dict[str, list]]] = {}
    for headline in found.headlines:
        pairs = zip(found.studies, claims_of(headline, reports), strict=True)
        there = [(s.size, c) for s, c in pairs if c is not None and len(c.differences) > 1]
        if len(there) < 2:
            continue
        by_unit.setdefault(there[0][1].unit, {})[headline.statement] = {
            "x": [size for size, _ in there],
            "y": [c.mean for _, c in there],
            "error": [c.interval.high - c.mean for _, c in there],
            "bound": [c.bound for _, c in there],
        }
    return [
        Picture(
            "trend" if i == 0 else f"trend-{i + 1}",
            # A legend names the headlines where there are several.
            "By study, with 95 % intervals, bounds dashed"
            + (f": {next(iter(series))}" if len(series) == 1 else ""),
            "",
            unit or "difference",
            "intervals",
            series,
        )
        for i, (unit, series) in enumerate(by_unit.items())
    ]


def last_pictures(found: Experiment, reports: Sequence[Report | None]) -> list[Picture]:
    """Each picture of the largest study that has it, of those that are done where one is; where
    several have it, its title says which."""
    there = [(s, r) for s, r in zip(found.studies, reports, strict=True) if r is not None]
    last: dict[str, Picture] = {}
    for study, report in sorted(there, key=lambda t: all(is_done(t[0], c) for c in t[1].claims)):
        for picture in report.pictures:
            of_many = picture.name in last
            title = f"{picture.title} ({study.size})" if of_many else picture.title
            last[picture.name] = replace(picture, title=title)
    return list(last.values())

"""The part of a page that an experiment makes: ``python -m bench.experiments.page [system ...]``.

bench/experiments/results/<system>.json holds the runs. Their tables stand in docs/zoo/<system>.md
between two marks, their pictures beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_ops._files import make_folder, write_text

from .report import Report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "experiments" / "results"
PAGES = ROOT / "docs" / "zoo"
BEGIN, END = "<!-- experiment -->", "<!-- /experiment -->"


def save(report: Report, results: Path = RESULTS, pages: Path = PAGES) -> list[Path]:
    """Writes JSON, tables and pictures of a run; returns the paths."""
    make_folder(results)
    path = results / f"{report.system}.json"
    report.write(path)
    return [path, *write_page(report, pages)]


def check(system: str, pages: Path = PAGES) -> list[str]:
    """The lines of the system's page.

    Raises:
        ValueError: no page, or one that lacks the two marks, each on a line of its own.
    """
    page = pages / f"{system}.md"
    lines = page.read_text("utf-8").splitlines() if page.is_file() else []
    if lines.count(BEGIN) != 1 or lines.count(END) != 1:
        raise ValueError(f"{page} must have one line {BEGIN} and one {END}.")
    return lines


def write_page(report: Report, pages: Path = PAGES) -> list[Path]:
    """The part between the marks and the pictures; the same errors as `check`."""
    lines = check(report.system, pages)
    page = pages / f"{report.system}.md"
    written, made = [page], [report.markdown().rstrip()]
    for picture in report.pictures:
        path = pages / f"{report.system}-{picture.name}.svg"
        picture.draw(path)
        written.append(path)
        made.append(f"![{picture.title}]({path.name})")
    begin, end = lines.index(BEGIN), lines.index(END)
    text = [*lines[: begin + 1], "\n\n".join(made), *lines[end:]]
    write_text(page, "\n".join(text) + "\n")
    return written


def load(system: str, results: Path = RESULTS) -> Report:
    return Report.from_dict(json.loads((results / f"{system}.json").read_text("utf-8")))


def main(systems: Sequence[str]) -> None:
    for system in systems or sorted(path.stem for path in RESULTS.glob("*.json")):
        write_page(load(system))


if __name__ == "__main__":
    main(sys.argv[1:])

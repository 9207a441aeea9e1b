"""Result of a lease: the journal in the form of bench/results, and its tables."""

from __future__ import annotations

from typing import Any

from bench.gpu import cases, report
from bench.gpu.card import slug
from bench.gpu.lease import cached, decode, stream, tiles
from bench.gpu.lease.child import Task
from bench.gpu.lease.journal import Journal, Record
from bench.gpu.lease.plan import MEASURED
from bench.gpu.limits import Limits
from bench.gpu.run import FORMAT, KIND, add_floors
from bench.harness.files import RESULTS, dumps, rounded
from moe_ops._files import write_text
from moe_ops.bench.report import table as markdown_table


def run(task: Task) -> tuple[int, str]:
    """Writes CARD.json and CARD.md to the folder, and to bench/results unless it was a dry run."""
    result = assemble(task.journal, dry=task.dry)
    if result is None:
        return 0, "nothing has been measured"
    name = slug(result["card"]["name"])
    text = f"{report.HOW}\n\n{report.markdown(result)}\n{more_tables(result)}"
    write_text(task.out / f"{name}.json", dumps(result))
    write_text(task.out / f"{name}.md", text)
    # An incomplete lease gives no result.
    if not task.dry and result["complete"]:
        write_text(RESULTS / f"{name}.json", dumps(result))
    report.print_result(result)
    print(more_tables(result))
    return 0, f"{task.out / name}.json and .md are written"


def more_tables(result: dict[str, Any]) -> str:
    parts = []
    programs = {"tiles": tiles, "decode": decode, "stream": stream, "cached": cached}
    for key, program in programs.items():
        if result[key]:
            title, header, rows = program.table(result[key])
            parts += [f"### {title}", markdown_table(header, rows, right_from=3)]
    if rows := _peaks(result["cells"]):
        header = ["part", "model", "T", "routing", "dtype", "MiB at the peak of a call"]
        parts += ["### Memory", markdown_table(header, rows, right_from=6)]
    return "\n\n".join(parts) + "\n"


def _peaks(cells: list[Record]) -> list[list[str]]:
    """Returns the additional memory of a call of each baseline, where measured."""
    rows = []
    for cell in cells:
        peaks = [
            f"{name} {found['peak_mib']:.4g}"
            for name, found in cell["contenders"].items()
            if "peak_mib" in found
        ]
        if peaks and cell["part"] in (*cases.BLOCK, *cases.STORED, *cases.ATTENTION):
            words = [cell["part"], cell["shape"], str(cell["T"]), cell["routing"], cell["dtype"]]
            rows.append([*words, ", ".join(peaks)])
    return rows


def assemble(journal: Journal, *, dry: bool) -> dict[str, Any] | None:
    """Returns the result, or None if nothing was measured."""
    measured = list(journal.records("measured"))
    cells = {r["case"]: r["cell"] for r in journal.records("cell")}
    if not measured or not cells:
        return None
    limits = Limits(**measured[0]["limits"])
    for record in measured[1:]:
        limits = limits.best(Limits(**record["limits"]))
    found = _outcomes(journal)
    result: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "complete": all(found.get(s, {}).get("status") == "passed" for s in MEASURED),
        "dry_run": dry,
        "date": measured[-1]["date"],
        "card": measured[-1]["card"],
        "versions": measured[-1]["versions"],
        "limits": limits.to_dict(),
        "absent": {k: v for record in measured for k, v in record["absent"].items()},
        "clocks": {"note": "; ".join(dict.fromkeys(_notes(measured)))},
        "seconds": round(sum(record["seconds"] for record in measured)),
        "trees": sorted({o["tree"] for o in found.values() if "tree" in o}),
        "steps": {name: _shown(o) for name, o in found.items()},
        "cells": list(cells.values()),
        "left_out": [],
        "tiles": [_plain(r) for r in journal.records("tile")],
        "decode": [_plain(r) for r in journal.records("decode")],
        "stream": [_plain(r) for r in journal.records("stream")],
        "cached": [_plain(r) for r in journal.records("cached")],
    }
    add_floors(result, limits)
    return dict(rounded(result))


def _notes(measured: list[Record]) -> list[str]:
    return [note for record in measured if (note := record["clocks"].get("note"))]


def _outcomes(journal: Journal) -> dict[str, Record]:
    """Returns the last outcome of each step, in the order of the first."""
    found: dict[str, Record] = {}
    for record in journal.records("outcome"):
        found[record["step"]] = record
    return found


def _shown(outcome: Record) -> Record:
    return {k: v for k, v in outcome.items() if k in ("status", "seconds", "text", "failed")}


def _plain(record: Record) -> Record:
    return {k: v for k, v in record.items() if k not in ("kind", "step")}

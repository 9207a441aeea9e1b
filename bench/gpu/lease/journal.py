"""Journal of results: a file of JSON lines, each written to disk before the next task begins.

A line has `kind` and `step`. "outcome" ends a step: status (passed, failed, unfinished, skipped),
seconds, text. Other kinds are results of a step: "machine", "check", "tile", "limits", "cell",
"decode", "stream", "cached". A line that was cut off by the loss of the machine is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
NAME = "journal.jsonl"


class Journal:
    """Journal of a folder, which is created if missing. Several processes may write, one at a
    time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME

    def write(self, kind: str, step: str, **more: Any) -> None:
        line = json.dumps({"kind": kind, "step": step, **more})
        with self.path.open("ab") as file:
            if file.tell() > 0 and not self._ends_with_a_line():
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_with_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def records(self, kind: str | None = None, step: str | None = None) -> Iterator[Record]:
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not isinstance(record, dict) or not {"kind", "step"} <= set(record):
                continue
            if kind in (None, record["kind"]) and step in (None, record["step"]):
                yield record

    def outcome(self, step: str) -> Record | None:
        """Returns the last outcome of the step."""
        outcomes = list(self.records("outcome", step))
        return outcomes[-1] if outcomes else None

    def passed(self, step: str) -> bool:
        outcome = self.outcome(step)
        return outcome is not None and outcome["status"] == "passed"

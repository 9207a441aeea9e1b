"""The files of MovieLens 100k, where the installed package recbole has them.

GroupLens' terms do not allow passing them on.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def folder() -> Path | None:
    """None where recbole is not installed; it is not imported."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "dataset_example" / "ml-100k"


def read(path: Path) -> list[list[str]]:
    """The fields of each line but the first, which names them."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t") for line in lines if line]

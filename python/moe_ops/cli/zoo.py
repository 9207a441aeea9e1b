"""`moe-ops zoo` and `moe-ops claims`: what the zoo holds, and the experiments of its systems."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ops import zoo


def listing() -> list[dict[str, Any]]:
    """Name, summary and presets of each system; presets are None where an extra is missing."""
    entries = []
    for name in zoo.systems():
        system = zoo.get(name)
        try:
            presets: list[str] | None = list(system.presets())
        except ImportError:
            presets = None
        entries.append(
            {"name": name, "summary": system.summary, "presets": presets, "needs": system.needs}
        )
    return entries


def print_listing(console: Console) -> None:
    table = Table()
    for column in ("system", "what it is", "presets"):
        table.add_column(column)
    for entry in listing():
        presets = entry["presets"]
        shown = f"needs [{entry['needs']}]" if presets is None else ", ".join(presets)
        table.add_row(entry["name"], escape(entry["summary"]), escape(shown))
    console.print(table)


def find_claims(system: str) -> ModuleType:
    """The module bench.claims.<system> of the source tree.

    Raises:
        ValueError: an unknown system, one without an experiment, or no source tree here.
    """
    zoo.get(system)
    # From the root of a source tree, or wherever this file lies in one.
    roots = [Path.cwd(), *Path(__file__).resolve().parents[2:4]]
    trees = [root for root in roots if (root / "bench" / "claims" / "__init__.py").is_file()]
    if not trees:
        raise ValueError(
            f"claims: must be run in the source tree, which has bench/claims, got {Path.cwd()}."
        )
    root = trees[0]
    if not (root / "bench" / "claims" / f"{system}.py").is_file():
        raise ValueError(f"claims: bench/claims must have {system}.py, got no such file yet.")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"bench.claims.{system}")


def check_page(system: str) -> None:
    """Before the run: ValueError where `save_claims` could not write."""
    importlib.import_module("bench.claims.page").check(system)


def save_claims(report: Any) -> list[Path]:
    """Writes a run into the tree that `find_claims` found: bench/claims/page.py says where."""
    paths: list[Path] = importlib.import_module("bench.claims.page").save(report)
    return paths

"""`moe-ops zoo`: contents of the zoo."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ops import zoo

EXPERIMENTS = (
    "What systems claim is put to small experiments in the source tree: "
    "python -m bench.studies NAME runs them (--list names them), docs/zoo/NAME.md has what "
    "they showed."
)


def listing() -> list[dict[str, Any]]:
    """Returns name, summary and presets of each system; presets are None if an extra is missing."""
    entries = []
    for name in zoo.list_models():
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
    methods = Table()
    for column in ("method", "what it is", "functions"):
        methods.add_column(column)
    for method in zoo.list_methods():
        functions = ", ".join(f"{method.module}.{name}" for name in method.functions)
        methods.add_row(method.name, escape(method.summary), functions)
    console.print(methods)
    console.print(EXPERIMENTS, markup=False, soft_wrap=True)

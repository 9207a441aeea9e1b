"""Tables printed by the commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from moe_ops.doctor import Report

_MARKS = {"ok": "[green]✓[/]", "info": "[blue]·[/]", "warning": "[yellow]![/]", "fail": "[red]✗[/]"}


def print_report(console: Console, report: Report) -> None:
    """Prints the doctor's findings, the self-test, and the conclusion."""
    for finding in report.findings:
        console.print(
            f"{_MARKS[finding.level]} [bold]{escape(finding.name)}[/] {escape(finding.text)}",
            soft_wrap=True,
        )
        if finding.advice:
            console.print(f"    → {escape(finding.advice)}", soft_wrap=True)
    for device in dict.fromkeys(test.device for test in report.self_tests):
        table = Table(
            title=f"Self-test on {device}: relative error against moe_ops.reference",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),  # All columns fit 80 characters.
        )
        for name in ("op", "dtype", "result"):
            table.add_column(name, no_wrap=True)
        for name in ("forward", "backward", "allowed", "ms"):
            table.add_column(name, justify="right", no_wrap=True)
        for test in report.self_tests:
            if test.device != device:
                continue
            table.add_row(
                test.op,
                test.dtype,
                "[green]pass[/]" if test.passed else "[red]FAIL[/]",
                _error(test.forward_error),
                _error(test.backward_error),
                _error(test.tolerance),
                f"{test.seconds * 1e3:.1f}",
            )
        console.print(table)
    for test in report.self_tests:
        if test.message:
            text = f"{escape(test.op)}: {escape(test.message)}"
            console.print(f"{_MARKS['fail']} {text}", soft_wrap=True)
    console.print(f"[bold]{escape(report.conclusion)}[/]", soft_wrap=True)


def _error(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}"

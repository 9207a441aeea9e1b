"""Tables that the commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from moe_ops.doctor import Report

_MARKS = {"ok": "[green]✓[/]", "info": "[blue]·[/]", "warning": "[yellow]![/]", "fail": "[red]✗[/]"}
_PASSES = (("forward", "forward"), ("forward_backward", "forward + backward"))


def print_report(console: Console, report: Report) -> None:
    """The doctor's findings, then the self-test, then one line to remember."""
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
        )
        table.add_column("op", no_wrap=True)
        table.add_column("dtype", no_wrap=True)
        table.add_column("result")
        table.add_column("forward", justify="right")
        table.add_column("backward", justify="right")
        table.add_column("allowed", justify="right")
        table.add_column("ms", justify="right")
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


def print_hf_comparison(console: Console, results: list[dict[str, Any]]) -> None:
    """Agreement and times of the Hugging Face models."""
    errors = Table(
        title="Distance to the same model in fp64 (relative, Frobenius norm)", title_justify="left"
    )
    for column in ("model", "experts", "logits", "gradients", "max |Δ logits|", "max |Δ gradient|"):
        errors.add_column(column, justify="left" if column in ("model", "experts") else "right")
    errors.add_column("fp32 bound", justify="right")
    errors.add_column("")
    for result in results:
        verdict = "[green]pass[/]" if result["passed"] else "[red]FAIL[/]"
        first = [result["model"], *[""] * (len(result["errors"]) - 1)]
        last = [("", "")] * (len(first) - 1) + [(_error(result["bound"]), verdict)]
        rows = zip(first, result["errors"].items(), last, strict=True)
        for model, (implementation, error), end in rows:
            numbers = [_error(value) for value in error.values()]
            errors.add_row(model, implementation, *numbers, *end, end_section=end[0] != "")
    console.print(errors)
    console.print("[dim]max |Δ| is the largest difference to eager in fp32.[/]")
    times = Table(title="Whole model, medians in ms; × = their ratio, times faster with moe_ops")
    times.title_justify = "left"
    for column in ("model", "pass", "moe_ops", "eager", "×", "grouped_mm", "×"):
        times.add_column(column, justify="left" if column in ("model", "pass") else "right")
    for result in results:
        for index, (key, label) in enumerate(_PASSES):
            times.add_row(
                result["model"] if index == 0 else f"[dim]{result['shape']}[/]",
                label,
                *_times(result[key], "moe_ops", ("eager", "grouped_mm")),
                end_section=index == 1,
            )
    console.print(times)


def _times(measured: Mapping[str, Any], ours: str, others: tuple[str, ...]) -> list[str]:
    cells = [f"{measured['seconds'][ours] * 1e3:.2f}"]
    for other in others:
        ratio = measured["speedup"][other]
        style = "green" if ratio >= 1.05 else "red" if ratio < 0.95 else "default"
        cells.append(f"{measured['seconds'][other] * 1e3:.2f}")
        cells.append(f"[{style}]{ratio:.2f}[/]")
    return cells


def _error(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}"

"""Markdown of a result. Tables are padded, so that they are readable in a terminal too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_ops.bench.shapes import SHAPES

HF = "HF grouped_mm"


def render(result: Mapping[str, Any]) -> str:
    """Returns the whole report of one run, headings from the second level on."""
    return join_sections([*head(result), *sections(result), *not_measured(result)])


def join_sections(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def sections(result: Mapping[str, Any]) -> list[str]:
    """Returns headings, explanations and tables of the measured modes."""
    parts: list[str] = []
    if result.get("forward"):
        parts += ["### Forward", _FORWARD, summary(result["forward"], HF)]
    if result.get("training"):
        parts += ["### Forward and backward", _TRAINING, _training(result["training"])]
    return parts


_FORWARD = """\
The experts of one layer for T tokens, routing given. *Floor* is the time that the limits above
allow: the larger of operations at peak and bytes of the experts used at the rate at which a buffer
of that size can be read again and again, from a cache or from memory. *Ours* reads packed weights,
as layers do in inference; *best peer* is the fastest of all others. `~`: fewer than three samples
did not have to wait for a core."""
_TRAINING = """\
Gradients of x, routing weights and both weights. The floor counts reading the weights twice and
writing their gradients once."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right_from: int = 1) -> str:
    """Returns a markdown table; columns from `right_from` on are right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def format_line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i >= right_from else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        ("-" * (w + 1) + ":") if i >= right_from else "-" * (w + 2) for i, w in enumerate(widths)
    ]
    return "\n".join([format_line(lines[0]), f"|{'|'.join(rule)}|", *map(format_line, lines[1:])])


def number(value: float) -> str:
    """Formats a number with three significant digits and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def head(result: Mapping[str, Any]) -> list[str]:
    """Returns the heading and conditions of a run."""
    limits = result["limits"]
    rates = ("fp32_flops", "bf16_flops", "read_bytes")
    fp32, bf16, memory = (f"{limits[key] / 1e9:.1f}" for key in rates)
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    used = {c["shape"] for mode in ("forward", "training") for c in result.get(mode, ())}
    facts = [
        f"{result['threads']} thread(s) unless said; {versions}",
        f"Limits, measured in the same run: fp32 {fp32} GFLOP/s, bf16 {bf16} GFLOP/s, memory "
        f"{memory} GB/s",
        "; ".join(f"{name}: {SHAPES[name]} ({SHAPES[name].like})" for name in sorted(used)),
    ]
    return [
        f"## {result['machine']['cpu']}, {result['isa']}",
        "\n".join(f"- {fact}." for fact in facts),
    ]


def summary(cells: Iterable[Mapping[str, Any]], other: str) -> str:
    """Summarizes moe_ops against the floor, the fastest other baseline, and `other`."""
    rows = []
    for cell in cells:
        baselines, ours = cell["contenders"], cell["ours"]
        if ours is None:
            continue
        best = best_peer(cell)
        row = [cell["shape"], cell["weights"], str(cell["T"]), number(cell["floor_ms"])]
        row += [milliseconds(baselines, ours), f"{baselines[ours]['of_limit']:.0%}"]
        row += [f"{best} {milliseconds(baselines, best)}" if best else "–"]
        row += [_ratio(baselines, best or "")]
        row += [_ratio(baselines, other), _error(baselines[ours])]
        rows.append(row)
    header = ["shape", "weights", "T", "floor ms", "ours ms", "of limit", "best peer ms"]
    header += ["ours vs best", f"vs {other}", "error"]
    return table(header, rows, right_from=2)


def best_peer(cell: Mapping[str, Any]) -> str | None:
    """Returns the fastest baseline other than moe_ops."""
    found = cell["contenders"].items()
    others = {n: c["ms"] for n, c in found if not n.startswith(("moe_ops", "bf16 moe_ops"))}
    return min(others, key=others.__getitem__) if others else None


def _training(cells: Iterable[Mapping[str, Any]]) -> str:
    cells = list(cells)
    names = list(dict.fromkeys(n for cell in cells for n in cell["contenders"]))
    others = [name for name in names if name != "moe_ops"]
    rows = []
    for cell in cells:
        baselines = cell["contenders"]
        if "moe_ops" not in baselines:
            continue
        row = [cell["shape"], cell["weights"] + (" THP" if cell.get("thp") else ""), str(cell["T"])]
        row += [number(cell["floor_ms"]), milliseconds(baselines, "moe_ops")]
        row += [f"{baselines['moe_ops']['of_limit']:.0%}"]
        for name in others:
            row += [milliseconds(baselines, name), _ratio(baselines, name)]
        rows.append([*row, _error(baselines["moe_ops"])])
    header = ["shape", "weights", "T", "floor ms", "ours ms", "of limit"]
    for name in others:
        header += [f"{name} ms", "ours faster"]
    return table([*header, "error"], rows, right_from=2)


def not_measured(result: Mapping[str, Any]) -> list[str]:
    """Lists skipped measurements, with reasons."""
    lines = [f"- {name}: {why}." for name, why in result["absent"].items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for mode in ("forward", "quantized", "training"):
        for cell in result.get(mode, ()):
            for name, why in cell["skipped"].items():
                where = f"{cell['shape']} {cell['weights']} T={cell['T']}"
                reasons.setdefault((name, why), []).append(where)
    for (name, why), cells in reasons.items():
        shown = ", ".join(cells[:4]) + (f" and {len(cells) - 4} more" if len(cells) > 4 else "")
        lines.append(f"- {name}: {why} ({shown}).")
    return ["### Not measured", "\n".join(lines)] if lines else []


def milliseconds(baselines: Mapping[str, Any], name: str) -> str:
    found = baselines.get(name)
    return "–" if found is None else number(found["ms"]) + ("~" if found.get("noisy") else "")


def _ratio(baselines: Mapping[str, Any], name: str) -> str:
    found = baselines.get(name)
    return f"{found['ours_faster']:.2f}x" if found and "ours_faster" in found else "–"


def _error(baseline: Mapping[str, Any]) -> str:
    return f"{baseline['error']:.1e}" if "error" in baseline else ""

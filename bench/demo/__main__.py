"""The command: ``python -m bench.demo``, with the options of ``moe-ops demo`` and --no-hf.

After the demo it compares the held-out loss with that of count models, prints the specialization of
each layer's experts, draws the loss, and compares models of transformers with and without
`moe_ops`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ops import _files, viz
from moe_ops.cli import main as moe_ops
from moe_ops.demo import data
from moe_ops.zoo.deepseek import DeepSeek

from . import hf_compare
from .routing import RoutingSample, entropies, inspect_routing, max_violation


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", add_help=False)
    parser.add_argument("--out", type=Path, default=Path("moe_demo"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--no-hf", action="store_true", help="compare no models of transformers")
    given, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    line = ["demo", "--out", str(given.out), *["--smoke"] * given.smoke, *rest]
    try:
        moe_ops(line)
    except SystemExit as done:
        if done.code or "--help" in rest or "-h" in rest:
            raise
    console = Console(highlight=False)
    path = given.out / "summary.json"
    summary = _files.read_json(path)
    corpus = data.load_corpus(summary["data"])
    counts = entropies(corpus)
    model = DeepSeek.from_pretrained(given.out / "model")
    sample = inspect_routing(model, corpus.heldout)
    print_routing(console, sample)
    draw(summary, counts, given.out / "loss.png", console)
    load = summary["tokens_per_expert"]
    summary |= {
        "entropy_bits_per_byte": counts,
        "information_bits_by_layer": sample.information,
        "favorite_bytes": sample.favorites,
        "max_violation_by_layer": max_violation(load[-max(1, len(load) // 10) :]),
        "hugging_face": None if given.no_hf else compare(console, given.smoke),
    }
    _files.write_json(path, summary)
    shown = ", ".join(f"{name} entropy {value:.3f}" for name, value in counts.items())
    console.print(f"Held-out text: {summary['heldout_bits_per_byte']:.3f} bits/byte; {shown}.")
    violations = ", ".join(f"{value:.2f}" for value in summary["max_violation_by_layer"])
    console.print(f"MaxVio by layer over the last tenth: {violations}.")
    return 0


def compare(console: Console, smoke: bool) -> list[dict[str, Any]] | None:
    if (missing := hf_compare.missing()) is not None:
        console.print(f"No models of transformers: {missing}.", markup=False, soft_wrap=True)
        return None
    results = hf_compare.compare(smoke=smoke, budget_s=0.1 if smoke else 4.0)
    hf_compare.print_comparison(console, results)
    return results


def draw(summary: dict[str, Any], counts: dict[str, float], path: Path, console: Console) -> None:
    try:
        viz._canvas.import_matplotlib()
    except viz._canvas.MissingMatplotlibError:
        return
    losses = summary["bits_per_byte"]
    measured = {int(step): value for step, value in summary["heldout_by_step"].items()}
    viz.plot_loss(
        losses,
        measured | {len(losses): summary["heldout_bits_per_byte"]},
        baselines={f"{name} entropy": value for name, value in counts.items()},
        title="Byte-level language model",
        path=path,
    )
    console.print(str(path), markup=False, soft_wrap=True)


def print_routing(console: Console, sample: RoutingSample) -> None:
    table = Table(title="First choices on held-out text", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("what the expert says about the byte")
    table.add_column("bytes each expert takes most beyond their share", overflow="fold")
    layers = zip(sample.information, sample.favorites, strict=True)
    for layer, (information, favorites) in enumerate(layers):
        table.add_row(
            str(layer),
            f"{information:.2f} of {sample.max_information:.2f} bits",
            escape("  ".join(f"{e}:{text}" for e, text in enumerate(favorites))),
            end_section=True,
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

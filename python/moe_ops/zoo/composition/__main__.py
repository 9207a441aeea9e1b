"""python -m moe_ops.zoo.composition --folder runs/composition: trains, composes, evaluates."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .._command import parse_settings
from .training import Settings, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_ops.zoo.composition", description=__doc__)
    settings, folder, progress = parse_settings(parser, Settings, argv)
    report = train(folder, settings, progress=progress)
    print(f"kept: {', '.join(report['kept'])}; {report['model of category']}")
    print(f"right categories: {report['right categories']:.3f}")
    for way, losses in report["losses"].items():
        print(f"{way:32}", *(f"{name} {loss:.4f}" for name, loss in losses.items()), "nats a byte")


if __name__ == "__main__":
    main()

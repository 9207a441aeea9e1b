"""python -m moe_ops.zoo.dynamicdino --folder runs/dynamicdino: trains a detector, tunes every arm,
evaluates."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .._command import parse_settings
from .training import Settings, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_ops.zoo.dynamicdino", description=__doc__)
    settings, folder, progress = parse_settings(parser, Settings, argv)
    report = train(folder, settings, progress=progress)
    for arm, found in report["arms"].items():
        print(f"{arm:14}", *(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()

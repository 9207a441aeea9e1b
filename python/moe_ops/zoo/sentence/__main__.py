"""python -m moe_ops.zoo.sentence --folder runs/sentence: trains every arm, evaluates retrieval."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .._command import parse_settings
from .training import Settings, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_ops.zoo.sentence", description=__doc__)
    settings, folder, progress = parse_settings(parser, Settings, argv)
    report = train(folder, settings, progress=progress)
    for arm, found in report["accuracy"].items():
        print(f"{arm:34}", *(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()

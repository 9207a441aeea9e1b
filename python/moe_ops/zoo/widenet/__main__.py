"""python -m moe_ops.zoo.widenet --folder runs/widenet: trains WideNet and its controls."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .._command import parse_settings
from .training import Settings, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_ops.zoo.widenet", description=__doc__)
    settings, folder, progress = parse_settings(parser, Settings, argv)
    report = train(folder, settings, progress=progress)
    for arm, found in report["arms"].items():
        print(f"{arm:22}", *(f"{name} {value:.6g}" for name, value in found.items()))


if __name__ == "__main__":
    main()

"""python -m moe_ops.zoo.gntmove --folder runs/gntmove: trains every arm, renders, draws views."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .._command import parse_settings
from .training import Settings, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_ops.zoo.gntmove", description=__doc__)
    settings, folder, progress = parse_settings(parser, Settings, argv)
    report = train(folder, settings, progress=progress)
    for arm, found in report["arms"].items():
        print(f"{arm:12}", *(f"{name} {value:.4f}" for name, value in found.items()))


if __name__ == "__main__":
    main()

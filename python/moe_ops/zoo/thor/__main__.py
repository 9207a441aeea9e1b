"""python -m moe_ops.zoo.thor --folder runs/thor: trains THOR and its controls, and translates."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .._command import parse_settings
from .training import Settings, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_ops.zoo.thor", description=__doc__)
    settings, folder, progress = parse_settings(parser, Settings, argv)
    report = train(folder, settings, progress=progress)
    print(f"{report['pairs']} pairs for training")
    for arm, found in report["arms"].items():
        print(f"{arm:10}", *(f"{name} {value:.4f}" for name, value in found.items()))


if __name__ == "__main__":
    main()

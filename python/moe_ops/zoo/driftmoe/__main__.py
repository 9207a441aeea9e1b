"""python -m moe_ops.zoo.driftmoe --folder runs/driftmoe: every arm over every stream."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .._command import parse_settings
from .picture import draw
from .training import Settings, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_ops.zoo.driftmoe", description=__doc__)
    settings, folder, progress = parse_settings(parser, Settings, argv)
    report = train(folder, settings, progress=progress)
    for stream, found in report["streams"].items():
        for arm, run in found["arms"].items():
            said = [f"{k} {v:.3f}" for k, v in run["numbers"].items() if v is not None]
            print(f"{stream:8} {arm:18}", *said)
    try:
        draw(report, Path(folder) / "curves.svg")
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()

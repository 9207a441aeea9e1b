"""Runs the benchmark of moe_ops with the other libraries that are installed.

    python -m bench.run --all --json bench/baselines/NAME.json

Options are those of ``python -m moe_ops.bench --help``. `bench/peers` has a file a library.
"""

from __future__ import annotations

from bench.peers import PEERS
from moe_ops.bench.main import main

if __name__ == "__main__":
    main(contenders=PEERS)

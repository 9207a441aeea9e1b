from __future__ import annotations

import sys

from moe_ops.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])

from __future__ import annotations

from moe_ops.cli import main

if __name__ == "__main__":
    main()

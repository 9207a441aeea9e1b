"""The ``moe-ops`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

MISSING_EXTRA = 'moe-ops needs its command-line extra: pip install "torch-moe-ops[cli]"'


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; without the `cli` extra it prints one sentence and exits with status
    1."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        print(MISSING_EXTRA, file=sys.stderr)
        sys.exit(1)
    try:
        from moe_ops.cli.app import app

        app(args=None if arguments is None else list(arguments), prog_name="moe-ops")
    except KeyboardInterrupt:  # While modules were loading; commands print their own message.
        print("Stopped.", file=sys.stderr)
        sys.exit(130)

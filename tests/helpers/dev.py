"""`moe_ops_dev`; a test module that imports it from here is skipped where it is not built."""

from __future__ import annotations

import pytest

__all__ = ["moe_ops_dev"]

try:
    from bench.harness.dev import moe_ops_dev
except ModuleNotFoundError as error:
    if error.name != "moe_ops_dev":
        raise
    pytest.skip(str(error), allow_module_level=True)

"""Finds `moe_ops_dev`, which shows tests and benchmarks the kernels' selections: tiles, block
sizes, tables (csrc/python/dev.cpp)."""

from __future__ import annotations

import sys

import moe_ops  # noqa: F401  # First: it loads the library that the module calls.
from bench.harness.files import ROOT

__all__ = ["moe_ops_dev"]

sys.path.append(str(ROOT / "build" / "moe_ops_dev"))
try:
    import moe_ops_dev
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "moe_ops_dev is not built for this Python: make build, or cmake as in CONTRIBUTING.md, "
        "where pybind11 is installed.",
        name="moe_ops_dev",
    ) from error

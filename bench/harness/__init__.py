"""Shared code of the source tree's benchmarks; the loop and the clocks are in `moe_ops.bench`."""

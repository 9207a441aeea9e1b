"""What the benchmarks of the source tree share; the loop and the clocks ship in `moe_ops.bench`."""

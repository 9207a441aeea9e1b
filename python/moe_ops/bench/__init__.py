"""Benchmarks of moe_ops against transformers, plain torch and the machine's limits: ``moe-ops
bench``.

`timing` interleaves runs and takes medians, `limits` measures the machine, `shapes` defines the
layers, `baselines` and `training` define the code that is run, `measure` runs it, and `report`
prints the results. The source tree has more in ``bench/``, which imports from here.
"""

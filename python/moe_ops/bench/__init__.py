"""Measures moe_ops against transformers, plain torch and the machine's limits: ``moe-ops bench``.

`timing` interleaves and takes medians, `limits` says what the machine can do, `shapes` holds the
layers, `baselines` and `training` say what is run, `measure` runs it, `report` prints it. The
source tree has more, in ``bench/``, which imports from here.
"""

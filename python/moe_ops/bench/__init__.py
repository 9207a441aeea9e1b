"""Measures moe_ops against other ways to run the same layer, and against the machine's limits.

``moe-ops bench`` runs it on what is installed; ``python -m bench.run`` in the source tree adds the
libraries of ``bench/peers`` and makes ``docs/performance.md``.

`timing` takes turns and medians, `limits` says what the machine can do, `shapes` holds the layers,
`contenders`, `training`, `parts` and `memory` say what is run, `run` runs it, `report` prints it.
"""

"""Builds, tests and measures the CUDA kernels on a card, in ten minutes.

    python -m bench.gpu

`main` runs the steps: `steps` builds, runs the op tests and compute-sanitizer; `run` measures.
`cases` has the layers, tokens and routings, `work` the operations and bytes of a case, `planner`
divides the time, `clock` takes samples (CUDA graphs and events, or the host's clock), `block`,
`ops` and `peers` hold what is compared, `limits` what the card can do, `card` what it is, `report`
the tables.

``--device cpu --dry-run --quick`` walks through all of it without a card, on tiny layers.
"""

"""Builds, tests and benchmarks the CUDA kernels on a GPU, in ten minutes.

    python -m bench.gpu

`main` runs the steps: `steps` builds, runs the op tests and compute-sanitizer; `run` measures.
`cases` has the layers, tokens and routings, `work` the operations and bytes of a case, `planner`
divides the time, `clock` takes samples (CUDA graphs and events, or the host's clock), `block`,
`ops` and `peers` define the compared code, `limits` the GPU's rates, `card` its identity, `report`
the tables.

``--device cpu --dry-run --quick`` runs all of it without a GPU, on tiny layers.
"""

"""Small experiments that show, or fail to show, what a system of the zoo claims.

One module a system, named as in `moe_ops.zoo`, with an `EXPERIMENT` of studies
(`bench.studies.study`). ``python -m bench.studies [SYSTEM ...] --hours 2`` runs what is
missing of them, at the root of the source tree; docs/zoo.md says how, and what a verdict is.
`subject` trains models that experiments on trained models share. `fp8_training`, `qlora` and
`quantized_quality` are scripts of their own, about precision.
"""

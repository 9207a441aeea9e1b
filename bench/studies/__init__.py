"""Small experiments that test the published claims of the zoo's models.

One module per model, named as in `moe_ops.zoo`, with an `EXPERIMENT` of studies
(`bench.studies.study`). ``python -m bench.studies [SYSTEM ...] --hours 2``, at the root of the
source tree, runs those that are missing; docs/zoo.md explains usage and verdicts. `subject` trains
models shared by experiments on trained models. `fp8_training`, `qlora`, `quantized_quality` and
`exported_quality` are separate scripts about precision.
"""

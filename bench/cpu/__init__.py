"""CPU benchmarks of moe_ops and other libraries, ``python -m bench.cpu``, and single comparisons:
`jetmoe_training`, `moa_attention`, `multitask`, `numerics`."""

"""moe_ops on a CPU beside other libraries, ``python -m bench.cpu``, and single comparisons:
`jetmoe_training`, `moa_attention`, `multitask`, `numerics`."""

"""Experiments on `moe_ops.zoo.bam`: data, training, measurements, and claims with their plan."""

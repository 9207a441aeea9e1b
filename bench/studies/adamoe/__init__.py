"""Experiments on `moe_ops.zoo.adamoe`: data, training, measurements, and claims with their plan."""

"""Experiments on `moe_ops.zoo.home`: data, training, measurements, and claims with their plan."""

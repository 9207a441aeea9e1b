"""Experiments on `moe_ops.zoo.gntmove`: data, training, measurements, and claims with their
plan."""

"""Experiments on `moe_ops.zoo.composition`: data, training, measurements, and claims with their
plan."""

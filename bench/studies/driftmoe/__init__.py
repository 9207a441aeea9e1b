"""Experiments on `moe_ops.zoo.driftmoe`: data, training, measurements, and claims with their
plan."""

"""Experiments on `moe_ops.zoo.factorllm`: data, training, measurements, and claims with their
plan."""

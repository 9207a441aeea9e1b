"""Experiments on `moe_ops.zoo.dynamicdino`: data, training, measurements, and claims with their
plan."""

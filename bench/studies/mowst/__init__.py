"""The lab of `moe_ops.zoo.mowst`: data, training, measures, and claims with their plan."""

"""The lab of `moe_ops.zoo.home`: data, training, measures, and claims with their plan."""

"""The lab of `moe_ops.zoo.widenet`: data, training, measures, and claims with their plan."""

"""The lab of `moe_ops.zoo.adamoe`: data, training, measures, and claims with their plan."""

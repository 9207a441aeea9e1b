"""The lab of `moe_ops.zoo.thor`: data, training, measures, and claims with their plan."""

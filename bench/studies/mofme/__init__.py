"""The lab of `moe_ops.zoo.mofme`: data, training, measures, and claims with their plan."""

"""The lab of `moe_ops.zoo.t2mir`: data, training, measures, and claims with their plan."""

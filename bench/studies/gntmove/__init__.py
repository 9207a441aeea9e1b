"""The lab of `moe_ops.zoo.gntmove`: data, training, measures, and claims with their plan."""

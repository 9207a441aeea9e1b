"""The lab of `moe_ops.zoo.driftmoe`: data, training, measures, and claims with their plan."""

"""The lab of `moe_ops.zoo.composition`: data, training, measures, and claims with their plan."""

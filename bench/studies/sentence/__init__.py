"""The lab of `moe_ops.zoo.sentence`: data, training, measures, and claims with their plan."""

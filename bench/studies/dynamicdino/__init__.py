"""The lab of `moe_ops.zoo.dynamicdino`: data, training, measures, and claims with their plan."""

"""The lab of `moe_ops.zoo.factorllm`: data, training, measures, and claims with their plan."""

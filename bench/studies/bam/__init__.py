"""The lab of `moe_ops.zoo.bam`: data, training, measures, and claims with their plan."""

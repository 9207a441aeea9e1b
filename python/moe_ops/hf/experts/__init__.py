"""The experts of transformers' MoE blocks on the ops of moe_ops, and switching a model to them."""

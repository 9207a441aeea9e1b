"""Experts of transformers' MoE blocks on the ops of moe_ops, and switching of models."""

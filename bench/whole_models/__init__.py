"""Whole models, token by token: transformers as it is, on moe_ops, and llama.cpp."""

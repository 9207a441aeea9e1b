"""Checkpoints with quantized experts: our own, published ones, and experts that stay on disk."""

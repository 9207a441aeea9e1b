"""Checkpoints with quantised experts: our own, published ones, and experts that stay on disk."""

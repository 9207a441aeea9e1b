"""Whole models on kernels for inference: norms, routers, and decoder layers on few tokens."""

"""Whole models on inference kernels: norms, routers, and decoder layers for few tokens."""

"""The demo of `make demo`: `moe_ops.demo`, the specialization of its experts, and a comparison with
eager models."""

"""Formulas in torch operations that replace ops without a kernel: on CUDA tensors, and in graphs
that are compiled or exported.

Each file is named after its op. Formulas compute in the op's dtypes, need no device sync, and can
be captured in a CUDA graph. Argument checks and registrations are in `moe_ops.ops`. Scores,
activations and quantization formats, which layers also need, are in `scores`, `activations` and
`codes`. `moe_ops.reference` is independent of these files, and tests/formulas compares the two.
"""

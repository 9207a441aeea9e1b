"""Formulas in torch's operations that run where an op has no kernel: on CUDA tensors, and in graphs
that are compiled or exported.

A file is named after its op. Formulas compute in the op's types, wait for no device, and can be
captured in a CUDA graph. Checks of arguments and registrations are in `moe_ops.ops`. Scores,
activations and number formats, which layers need as well, are in `scores`, `activations` and
`codes`. `moe_ops.reference` is written apart from these files, and tests/formulas compares the two.
"""

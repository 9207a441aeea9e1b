"""Calls of every op on both sides of every size at which a kernel changes what it does.

The sizes come from the kernels themselves (``moe_ops_dev.block_sizes()``,
csrc/cpu/gemm/blocking.cpp), so a new constant brings its cases. A case is a line of text that says
everything about a call:

    python -m tests.sweep --isa avx2 "op=grouped_gemm dtype=bf16 rows=129 k=193 n=8 seed=3"

runs one; ``make fuzz`` runs all of them and then random ones. cases.py makes cases, checks.py runs
them against the fp64 reference, __main__.py keeps the processes.
"""

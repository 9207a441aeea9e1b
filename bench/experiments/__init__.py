"""Small experiments that show, or fail to show, what a system of the zoo claims.

One file a system, named as in `moe_ops.zoo`, with

    def run(seeds: Sequence[int], log: Callable[[str], None]) -> Report

``python -m bench.experiments.NAME --seeds 3`` runs it at the root of the source tree; with
``--save`` the numbers go to bench/experiments/results, tables and pictures to docs/zoo. A run takes
at most ten minutes on two cores with three seeds. Arms that are compared share seed, data and data
order, and what is compared is the difference within a seed.
"""

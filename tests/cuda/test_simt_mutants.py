"""The kernels of routing, permutation and column sums, broken one place at a time."""

from __future__ import annotations

from tests.helpers.simulator import noticed_mutants


def test_mutants_are_noticed(simulator):
    """Barriers, ranks, ties, terms, bounds and stores of the compiled kernels (simt_mutants.py)."""
    noticed = noticed_mutants("simt_mutants")
    assert len(noticed) >= 10
    assert [name for name, how in noticed.items() if how is None] == []

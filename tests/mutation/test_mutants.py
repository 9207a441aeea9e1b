"""The table of mutants keeps up with the sources."""

from tests.mutation import mutants_cpu


def test_every_mutant_has_a_place():
    """Its text occurs in its file, once or as often as `nth` needs."""
    for _, mutant in mutants_cpu.NUMBERED:
        mutant.place((mutants_cpu.ROOT / "csrc" / "cpu" / mutant.file).read_text())

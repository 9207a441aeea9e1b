"""Everything that a card must tell, in the minutes for which a machine with one is lent.

    python -m bench.gpu.lease --out FOLDER

Steps run one after another, each in a process of its own with a time limit. What a step finds is
written to FOLDER/journal.jsonl before the next one begins, so that nothing is lost when the machine
is taken away; the same command goes on where it stopped. Needs no network, no pip and no installed
moe_ops: the library is built by CMake alone, or a built one is carried along.

`main` is the command and walks over the steps, `plan` has the steps, `journal` what is known of
them, `build` makes the package. These import no torch. `child` is the process of a step: `smoke`,
`tiles`, `measure`, `decode`, `result`.

docs/cuda-on-a-lent-machine.md says how to use it; ``--dry`` walks through it on tiny layers.
"""

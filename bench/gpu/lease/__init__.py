"""All measurements of a GPU, ordered for a machine that is lent for limited minutes.

    python -m bench.gpu.lease --out FOLDER

Steps run one after another, each in its own process with a time limit. A step's results are written
to FOLDER/journal.jsonl before the next one begins, so that nothing is lost when the machine is
taken away; running the command again continues. It needs no network, no pip and no installed
moe_ops: the library is built by CMake alone, or a built one is provided.

`main` is the command and runs the steps, `plan` defines them, `journal` stores results, `build`
creates the package. These import no torch. `child` is the process of a step: `smoke`, `tiles`,
`measure`, `decode`, `stream`, `cached`, `result`.

See docs/cuda-on-a-lent-machine.md for usage; ``--dry`` runs it on tiny layers.
"""

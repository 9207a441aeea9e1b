"""Which bits the kernels promise: whether a token's output may depend on its batch.

Every op gives the same bits in every run, with any number of threads. The kernels choose an
algorithm by the number of rows of each expert, though, and algorithms round differently, so that a
token's output can differ in its last bits (with quantised experts on the CPU, by about 1 %) between
a call for it alone and a call for it among others. With the batch-invariant mode on it does not: a
token's output then depends on that token, the weights and the instruction set, or on CUDA the card,
alone.

docs/numerics.md has the guarantees by op, and what the mode costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_ops import _C

# What the kernels read, as Python reads it: layers that choose between torch's product and an op of
# this package ask for it, and a graph of torch.compile that depends on it is compiled anew when it
# changes.
_mode: bool = _C.batch_invariant()


def set_batch_invariant(mode: bool) -> None:
    """Turns the batch-invariant mode of the CPU and CUDA kernels on or off.

    With it on, the bits of a token's output do not depend on how many other tokens are in the call,
    on where among them it is, or on how they are routed. Gradients are not covered.

    It is one setting of the process, for all threads, which each op reads when it is called: a
    compiled graph follows the setting at the time it runs, a CUDA graph keeps the kernels that it
    captured. Its value at the start is on if the
    environment variable ``MOE_OPS_BATCH_INVARIANT`` is ``1``, otherwise off.

    Args:
        mode: ``True`` for on.

    Raises:
        TypeError: ``mode`` is not a bool.
    """
    if not isinstance(mode, bool):
        raise TypeError(f"set_batch_invariant: mode must be a bool, got {mode!r}")
    global _mode
    _C.set_batch_invariant(mode)
    _mode = mode


def is_batch_invariant() -> bool:
    """Whether the batch-invariant mode is on (:func:`set_batch_invariant`)."""
    return _mode


@contextmanager
def batch_invariant(mode: bool = True) -> Iterator[None]:
    """Sets the batch-invariant mode for a block, and restores it after that.

    The setting is of the process (:func:`set_batch_invariant`): other threads see it as well.
    """
    before = is_batch_invariant()
    set_batch_invariant(mode)
    try:
        yield
    finally:
        set_batch_invariant(before)

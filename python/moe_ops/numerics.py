"""Batch-invariant mode: whether a token's output may depend on its batch.

Every op is bitwise reproducible in every run, with any number of threads. However, the kernels
select an algorithm by the number of rows of each expert, and algorithms round differently, so that
a token's output can differ in its last bits (with quantized experts on the CPU, by about 1 %)
between a call for it alone and a call with other tokens. In batch-invariant mode it does not: a
token's output then depends only on that token, the weights, and the instruction set (on CUDA, the
GPU).

docs/numerics.md states the guarantees by op, and the cost of the mode.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress

from moe_ops import _library

# Python copy of the kernels' setting: layers use it to select between torch's GEMM and an op of
# this package, and a torch.compile graph that depends on it is recompiled when it changes.
_mode: bool = _library.batch_invariant()


class _Block:
    """One open `batch_invariant` block."""

    def __init__(self, mode: bool) -> None:
        self.mode = mode


# The mode outside of all blocks; the open blocks of each thread or asyncio task in the order in
# which they were entered; and the number of threads and tasks whose innermost block has either
# mode.
_base: bool = _mode
_open: dict[Hashable, list[_Block]] = {}
_wishes: dict[bool, int] = {True: 0, False: 0}
# Reentrant: garbage collection inside may close a block.
_lock = threading.RLock()


def _owner() -> Hashable:
    """Returns the current asyncio task, or the thread if there is none."""
    asyncio = sys.modules.get("asyncio")  # Without the module there are no tasks.
    if asyncio is not None:
        with suppress(RuntimeError):  # No event loop runs in this thread.
            task: Hashable | None = asyncio.current_task()
            if task is not None:
                return task
    return threading.get_ident()


def _apply() -> None:
    """Sets the mode required by the open blocks, or the base setting without blocks."""
    global _mode
    mode = _wishes[True] > 0 or (_base and _wishes[False] == 0)
    if mode != _mode or mode != _library.batch_invariant():
        _library.set_batch_invariant(mode)
        _mode = mode


def _enter(owner: Hashable, block: _Block) -> None:
    with _lock:
        blocks = _open.setdefault(owner, [])
        if blocks:
            _wishes[blocks[-1].mode] -= 1
        blocks.append(block)
        _wishes[block.mode] += 1
        _apply()


def _leave(owner: Hashable, block: _Block) -> None:
    """Closes a block, which need not be the innermost: generators may end in any order."""
    with _lock:
        blocks = _open[owner]
        _wishes[blocks[-1].mode] -= 1
        blocks.remove(block)
        if blocks:
            _wishes[blocks[-1].mode] += 1
        else:
            del _open[owner]
        _apply()


def _after_fork() -> None:
    """Closes the blocks of threads that do not exist in a forked process."""
    global _lock
    _lock = threading.RLock()  # One of those threads may hold the old lock.
    here = (_owner(), threading.get_ident())
    for owner in [owner for owner in _open if owner not in here]:
        _wishes[_open.pop(owner)[-1].mode] -= 1
    _apply()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def set_batch_invariant(mode: bool) -> None:
    """Turns the batch-invariant mode of the CPU and CUDA kernels on or off.

    In this mode, a token's output does not depend bitwise on the number of other tokens in the
    call, its position among them, or their routing. Gradients are not covered.

    It is one setting of the process, for all threads, which each op reads when it is called: a
    compiled graph follows the setting at run time, a CUDA graph keeps the kernels that it captured.
    It is initially on if the environment variable ``MOE_OPS_BATCH_INVARIANT`` is ``1``, otherwise
    off. While a :func:`batch_invariant` block is open anywhere in the process, the blocks determine
    the mode, and this setting applies after the last of them ends.

    Args:
        mode: ``True`` for on.

    Raises:
        TypeError: ``mode`` is not a bool.
    """
    if not isinstance(mode, bool):
        raise TypeError(f"set_batch_invariant: mode must be a bool, got {mode!r}")
    global _base
    with _lock:
        _base = mode
        _apply()


def is_batch_invariant_enabled() -> bool:
    """Returns True if the batch-invariant mode is on (:func:`set_batch_invariant`)."""
    return _mode


@contextmanager
def batch_invariant(mode: bool = True) -> Iterator[None]:
    """Turns the batch-invariant mode on, or off, for a block.

    The mode is one setting of the process, and blocks of several threads and asyncio tasks may be
    open concurrently, entered and left in any order. In each thread or task, the innermost open
    block counts. The mode is on while it is ``batch_invariant(True)`` in any of them; otherwise off
    while one of them has a ``batch_invariant(False)`` block; and without open blocks it is the
    setting of :func:`set_batch_invariant`. So a block that turns it on has it on throughout, and
    other threads are affected too; a block that turns it off is for measurements in a process that
    does nothing else.

    Args:
        mode: ``True`` for on.

    Raises:
        TypeError: ``mode`` is not a bool.
    """
    if not isinstance(mode, bool):
        raise TypeError(f"batch_invariant: mode must be a bool, got {mode!r}")
    owner, block = _owner(), _Block(mode)
    _enter(owner, block)
    try:
        yield
    finally:
        _leave(owner, block)

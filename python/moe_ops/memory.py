"""CPU memory: reuse of freed outputs, and huge pages for weights.

When a large output of an op is freed (8 MiB and more; mostly weight gradients), its memory is kept
for the next one, because the system must zero fresh memory first, which takes as long as a third of
a layer's backward. The system may reclaim the kept pages at any time. ``MOE_OPS_CACHE_MB`` in the
environment sets the maximum (0: nothing); the default is a quarter of the machine's memory, or
nothing while the address space of the process is limited (``ulimit -v``), because kept memory uses
addresses that other allocations may need. With torch 2.10, which lacks the required interface,
nothing is kept.

Reading weights is faster from pages of 2 MiB than from the 4 KiB pages of torch's allocator:
:func:`use_huge_pages`. On Linux, float experts move there automatically, in parts, once unchanged
weights have been read so often that moving would have paid off; quantized experts request such
pages before they are filled, which costs nothing. ``MOE_OPS_HUGE_PAGES=0`` in the environment
disables this; forked processes do not do it either, because each would get a separate copy of
weights that it shares with its parent.

:func:`memory_stats` lists all memory that this package keeps.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _library
from moe_ops._sharded import check_whole

__all__ = [
    "available_memory",
    "empty_cache",
    "memory_stats",
    "release_file_pages",
    "use_huge_pages",
]

# Smaller tensors may not contain a whole page of 2 MiB, and stay in a cache anyway.
_HUGE_FROM = 4 << 20
_HUGE_PAGE = 2 << 20

# Maximum bytes that one call may pack or move automatically. In a virtual machine that must be
# given the memory first, each MiB takes milliseconds.
BYTES_A_CALL = 32 << 20
# Maximum rows per expert and call that count as use: the weights are read once for all of them, and
# more rows do not increase the benefit.
ROWS_THAT_COUNT = 16
# Moving weights costs as much as about 250 calls with enough rows save.
HUGE_PAGES_AFTER_ROWS = 256 * ROWS_THAT_COUNT


def _check_limit() -> None:
    megabytes = os.environ.get("MOE_OPS_CACHE_MB")
    if megabytes is not None and not (megabytes.isascii() and megabytes.isdecimal()):
        warnings.warn(
            f"MOE_OPS_CACHE_MB={megabytes} is not a whole number of MiB; ignored.", stacklevel=2
        )


_check_limit()

_by_themselves = os.environ.get("MOE_OPS_HUGE_PAGES") != "0"
_holders: dict[str, Callable[[], int]] = {}


def register_holder(name: str, num_bytes: Callable[[], int]) -> None:
    """Adds an entry to :func:`memory_stats`."""
    _holders[name] = num_bytes


def memory_stats() -> dict[str, int]:
    """Returns the bytes that this package keeps in addition to its callers' tensors, by purpose.

    Returns:
        ``"outputs"``: :func:`cached_bytes`. ``"packed weights"``: copies of expert weights,
        including those in progress (`moe_ops.packed_weight_bytes`). ``"original weights"``: weights
        that `moe_ops.hf.optimize` keeps to restore models exactly.
    """
    return {"outputs": cached_bytes(), **{name: count() for name, count in _holders.items()}}


def cached_bytes() -> int:
    """Returns the bytes that are kept and not used by a tensor."""
    return _library.cached_bytes()


def get_cache_limit() -> int:
    """Returns the maximum bytes that are kept."""
    return _library.cache_limit()


def empty_cache() -> None:
    """Returns all kept memory to the system. Tensors in use are not affected."""
    _library.release_cached()


def use_huge_pages(*owners: Tensor | nn.Module) -> int:
    """Moves the memory of tensors to pages of 2 MiB. Their values and addresses do not change.

    It is meant for weights that are read repeatedly: experts in a compiled model, ``main_grads``
    buffers, any large layer. It takes 0.2 to 1.2 seconds per GiB, and 2.5 in a virtual machine that
    must be given the memory first.

    Args:
        owners: tensors, and modules with all their parameters and buffers. Only plain strided CPU
            tensors with a storage of at least 4 MiB are moved, and of these only whole pages of 2
            MiB.

    Returns:
        Bytes that were moved, or already were in such pages. It is less than requested if memory is
        short, and 0 without Linux 6.1 and for tensors in a mapped file. (If the system can move
        them later automatically, it is asked to.)

    Raises:
        ValueError: a DTensor; the result of its `to_local()` is a plain tensor.
    """
    named: list[tuple[str, Tensor]] = []
    for owner in owners:
        if isinstance(owner, Tensor):
            named.append(("the tensor", owner))
        else:
            named += [*owner.named_parameters(), *owner.named_buffers()]
    for name, tensor in named:
        check_whole("use_huge_pages", name, tensor, "give it what to_local() returns")
    tensors = [tensor for _, tensor in named]
    # Views and tied weights share a storage.
    storages = [t.untyped_storage() for t in tensors if is_plain(t)]
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() >= _HUGE_FROM}
    return sum(_library.use_huge_pages(address, size) for address, size in sizes.items())


class _Move:
    """Remaining parts of a module's weights at `addresses` to move."""

    def __init__(self, addresses: tuple[int, ...], weights: tuple[Tensor, ...]) -> None:
        self.addresses = addresses
        self.rows = 0
        self.parts: list[tuple[int, int]] = []
        for w in weights:
            first = -(-w.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
            end = w.data_ptr() + w.nbytes
            if not w.is_shared() and w.is_contiguous():
                starts = range(first, end, BYTES_A_CALL)
                self.parts += [(start, min(BYTES_A_CALL, end - start)) for start in starts]


_moves: weakref.WeakKeyDictionary[nn.Module, _Move] = weakref.WeakKeyDictionary()
_waited = 0


def take_turn(waiting: int) -> bool:
    """Returns whether a module may spend BYTES_A_CALL now, given the number of modules that are or
    will be due.

    One of them may per round of calls, so that a pass through a whole model has one pause.
    """
    global _waited
    _waited += 1
    if _waited < waiting:
        return False
    _waited = 0
    return True


def counted_rows(num_slots: int, num_experts: int) -> int:
    """Returns the rows of one call, over all experts, that count as use of its weights."""
    return min(num_slots, ROWS_THAT_COUNT * num_experts)


def move_when_paid(module: nn.Module, num_slots: int, *weights: Tensor) -> int:
    """Moves weights to huge pages automatically, one part per call, once calls would have saved the
    cost.

    Args:
        module: owner of the weights.
        num_slots: of this call.
        weights: [E, ...] each. A new address restarts the count.

    Returns:
        Bytes that this call has moved.
    """
    large = any(w.nbytes >= _HUGE_FROM for w in weights)
    if not (_by_themselves and large and all(is_plain(w) for w in weights)):
        return 0
    try:
        addresses = tuple(w.data_ptr() for w in weights)
    except RuntimeError:  # Wrapped by a transformation of torch.func.
        return 0
    move = _moves.get(module)
    if move is None or move.addresses != addresses:
        move = _moves[module] = _Move(addresses, weights)
    if not move.parts:
        return 0
    num_experts = weights[0].shape[0]
    move.rows += counted_rows(num_slots, num_experts)
    if move.rows < HUGE_PAGES_AFTER_ROWS * num_experts:
        return 0
    if not take_turn(sum(bool(m.parts) for m in list(_moves.values()))):
        return 0
    return _library.use_huge_pages(*move.parts.pop(0))


def advise_huge_pages(*tensors: Tensor) -> None:
    """Requests pages of 2 MiB, which costs nothing if the memory has not been written yet."""
    for t in tensors:
        if _by_themselves and is_plain(t) and t.nbytes >= _HUGE_FROM and not t.is_shared():
            storage = t.untyped_storage()
            first = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
            madvise(first, storage.data_ptr() + storage.nbytes() - first, _MADV_HUGEPAGE)


def new_zeros(*shape: int, dtype: torch.dtype, device: Any = None) -> Tensor:
    """Returns torch.zeros in pages of 2 MiB, if large."""
    t = torch.empty(shape, dtype=dtype, device=device)
    advise_huge_pages(t)
    return t.zero_()


_MADV_HUGEPAGE = 14
_MADV_PAGEOUT = 21  # Linux 5.4


def madvise(address: int, num_bytes: int, advice: int) -> bool:
    """Makes the system call of this name for pages from `address` on; returns False if it was not
    done. Other Python threads run meanwhile."""
    if sys.platform != "linux":
        return False
    return _system_call()(address, num_bytes, advice) == 0


@lru_cache
def _system_call() -> Any:
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


# Files of weights: the hub's cache links their names to files that are named by their SHA-256.
_WEIGHT_FILES = r"\.safetensors$|/blobs/[0-9a-f]{64}$"


def release_file_pages(pattern: str = _WEIGHT_FILES) -> int:
    """Releases the pages of mapped files from this process's memory; they are read again if needed.

    The touched pages of a memory-mapped checkpoint stay in memory while any tensor uses the
    mapping. Nothing is lost: written pages are kept.

    Args:
        pattern: regular expression, searched in the paths of mapped files after links are
            resolved; by default, it finds safetensors files, and those in the hub's cache.

    Returns:
        Bytes of the mappings that the system was asked to release; 0 on other systems than Linux.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    asked = 0
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and re.search(pattern, fields[5]):
            first, last = (int(n, 16) for n in fields[0].split("-"))
            if madvise(first, last - first, _MADV_PAGEOUT):
                asked += last - first
    return asked


def available_memory() -> int:
    """Returns the bytes that this process can still allocate without swapping; 0 if unknown."""
    available = _first_number("/proc/meminfo", "MemAvailable:") * 1024
    for limit, used, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        group = Path("/sys/fs/cgroup")  # The group of a container, as seen from inside.
        most = _first_number(group / limit)
        if most:
            # Files in the page cache count as used, but are evicted on demand.
            files = _first_number(group / statistics, "inactive_file")
            left = most - _first_number(group / used) + files
            available = min(available, max(left, 0))
    return available


def _first_number(path: str | Path, line_start: str = "") -> int:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(line_start):
                return int(line.removeprefix(line_start).split()[0])
    except (OSError, ValueError):  # No such file, or "max".
        pass
    return 0


def is_plain(tensor: Tensor) -> bool:
    """Returns whether the tensor has its own memory; fake and sharded tensors are subclasses."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _after_fork() -> None:
    global _by_themselves
    _by_themselves = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

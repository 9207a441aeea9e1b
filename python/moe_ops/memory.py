"""Memory on the CPU: that which outputs leave behind, and that of weights.

When a large output of an op is freed (8 MiB and more: weight gradients, above all), its memory is
kept for the next one, because fresh memory has to be zeroed by the system first, which takes as
long as a third of a layer's backward. The system may take the kept pages back whenever it needs
them. ``MOE_OPS_CACHE_MB`` in the environment sets how much is kept at most (0: nothing); otherwise
it is a quarter of the machine's memory, or nothing while the address space of the process is
limited (``ulimit -v``), because kept memory takes addresses that other allocations may want. With
torch 2.10, which lacks what this needs, nothing is kept.

Weights are read faster from pages of 2 MiB than from those of 4 KiB that torch's allocator gets:
:func:`use_huge_pages`. On Linux, banks of float experts do it by themselves once unchanged weights
have been read so often that it would have paid by then, a part at a time; quantized ones ask for
such pages before they are filled, which costs nothing. ``MOE_OPS_HUGE_PAGES=0`` in the environment
turns that off; a process that was forked does not do it either, because it would get a copy of its
own of weights that it shares with its parent.

:func:`memory_stats` lists all memory that this package keeps for itself.
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
    "get_cache_limit",
    "memory_stats",
    "release_file_pages",
    "use_huge_pages",
]

# What is smaller may not hold a whole page of 2 MiB, and lies in a cache anyway.
_HUGE_FROM = 4 << 20
_HUGE_PAGE = 2 << 20

# What one call may pack or move of weights that nobody asked to pack or move. Where a virtual
# machine has to be given the memory first, each MiB takes milliseconds.
BYTES_A_CALL = 32 << 20
# Of one call, the rows per expert that count as use: the weights are read once for all of them, and
# more rows gain nothing more.
ROWS_THAT_COUNT = 16
# Moving weights takes as long as some 250 calls with enough rows save by it.
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
    """Bytes that this package holds beside the tensors of its callers, by what they are for.

    Returns:
        ``"outputs"``: :func:`cached_bytes`. ``"packed weights"``: copies of expert weights, those
        that are being made included (`moe_ops.packed_weight_bytes`). ``"original weights"``: what
        `moe_ops.hf.optimize` keeps of models that it can restore exactly.
    """
    return {"outputs": cached_bytes(), **{name: count() for name, count in _holders.items()}}


def cached_bytes() -> int:
    """Bytes that are kept and that no tensor uses."""
    return _library.cached_bytes()


def get_cache_limit() -> int:
    """The most bytes that are kept."""
    return _library.cache_limit()


def empty_cache() -> None:
    """Returns everything that is kept to the system. Tensors in use are not touched."""
    _library.release_cached()


def use_huge_pages(*owners: Tensor | nn.Module) -> int:
    """Moves the memory of tensors to pages of 2 MiB. Their values and addresses stay.

    For weights that something reads over and over: a bank in a compiled model, buffers of
    ``main_grads``, any large layer. It takes 0.2 to 1.2 seconds a GiB, and 2.5 in a virtual machine
    that has to be given the memory first.

    Args:
        owners: tensors, and modules, of which all parameters and buffers are meant. Only plain
            strided CPU tensors whose storage takes 4 MiB or more are moved, and of these what is
            whole pages of 2 MiB.

    Returns:
        Bytes that were moved, or lay there before. Less than asked for where memory is short; 0
        without Linux 6.1, and for tensors in a mapped file. (Where the system can move them later
        by itself, it is asked to.)

    Raises:
        ValueError: a DTensor; what its `to_local()` returns is a plain tensor.
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
    """What is left to move of a module's weights, as they lie at `addresses`, part by part."""

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
    """Whether a module may spend BYTES_A_CALL now, one of so many that are, or will be, due.

    One of them may in a round of calls, so that a pass through a whole model has one pause.
    """
    global _waited
    _waited += 1
    if _waited < waiting:
        return False
    _waited = 0
    return True


def counted_rows(num_slots: int, num_experts: int) -> int:
    """The rows of one call that count as use of its weights, of all experts together."""
    return min(num_slots, ROWS_THAT_COUNT * num_experts)


def move_when_paid(module: nn.Module, num_slots: int, *weights: Tensor) -> int:
    """use_huge_pages by itself, a part a call, once calls would have saved what it takes.

    Args:
        module: that the weights belong to.
        num_slots: of this call.
        weights: [E, ...] each. A new address starts the count again.

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
    """Asks for pages of 2 MiB, which costs nothing where the memory has not been written yet."""
    for t in tensors:
        if _by_themselves and is_plain(t) and t.nbytes >= _HUGE_FROM and not t.is_shared():
            storage = t.untyped_storage()
            first = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
            madvise(first, storage.data_ptr() + storage.nbytes() - first, _MADV_HUGEPAGE)


def new_zeros(*shape: int, dtype: torch.dtype, device: Any = None) -> Tensor:
    """torch.zeros in pages of 2 MiB, if large."""
    t = torch.empty(shape, dtype=dtype, device=device)
    advise_huge_pages(t)
    return t.zero_()


_MADV_HUGEPAGE = 14
_MADV_PAGEOUT = 21  # Linux 5.4


def madvise(address: int, num_bytes: int, advice: int) -> bool:
    """The system call of this name on pages from `address` on; False where it is not done. Other
    Python threads run meanwhile."""
    if sys.platform != "linux":
        return False
    return _system_call()(address, num_bytes, advice) == 0


@lru_cache
def _system_call() -> Any:
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def release_file_pages(pattern: str = r"\.safetensors$") -> int:
    """Takes the pages of mapped files out of this process's memory; they are read again if needed.

    A checkpoint that was read through a mapping stays in memory, as far as it was touched, while
    any tensor lies in it. Nothing is lost: pages that were written stay.

    Args:
        pattern: regular expression that is searched for in the paths of mapped files.

    Returns:
        Bytes of the mappings that the system was asked to release; 0 elsewhere than on Linux.
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
    """Bytes that this process can still take without swapping; 0 where the system does not say."""
    available = _first_number("/proc/meminfo", "MemAvailable:") * 1024
    for limit, used, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        group = Path("/sys/fs/cgroup")  # The group of a container, as seen from inside.
        most = _first_number(group / limit)
        if most:
            # Files in the page cache count as used, but go when memory is asked for.
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
    """Whether the tensor has memory of its own; fake and sharded ones are subclasses."""
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

"""Memory on the CPU: that which outputs leave behind, and that of weights.

When a large output of an op is freed (8 MiB and more: weight gradients, above all), its memory is
kept for the next one, because fresh memory has to be zeroed by the system first, which takes as
long as a third of a layer's backward. The system may take the kept pages back whenever it needs
them. ``MOE_OPS_CACHE_MB`` in the environment sets how much is kept at most (0: nothing); otherwise
it is a quarter of the machine's memory, or nothing while the address space of the process is
limited (``ulimit -v``), because kept memory takes addresses that other allocations may want. With
torch 2.10, which lacks what this needs, nothing is kept.

Weights are read faster from pages of 2 MiB than from those of 4 KiB that torch's allocator gets:
:func:`use_huge_pages`. Banks of experts do it by themselves, on Linux, at the first call that reads
their weights as they are, and quantised ones when they are filled. ``MOE_OPS_HUGE_PAGES=0`` in the
environment turns that off; a process that was forked does not do it either, because it would get a
copy of its own of weights that it shares with its parent.
"""

from __future__ import annotations

import os
import warnings
import weakref
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_ops import _C
from moe_ops._sharded import check_whole

# What is smaller may not hold a whole page of 2 MiB, and lies in a cache anyway.
_HUGE_FROM = 4 << 20


def _check_limit() -> None:
    megabytes = os.environ.get("MOE_OPS_CACHE_MB")
    if megabytes is not None and not (megabytes.isascii() and megabytes.isdecimal()):
        warnings.warn(
            f"MOE_OPS_CACHE_MB={megabytes} is not a whole number of MiB; ignored.", stacklevel=2
        )


_check_limit()

_by_themselves = os.environ.get("MOE_OPS_HUGE_PAGES") != "0"
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()


def cached_bytes() -> int:
    """Bytes that are kept and that no tensor uses."""
    return _C.cached_bytes()


def cache_limit() -> int:
    """The most bytes that are kept."""
    return _C.cache_limit()


def release_cached() -> None:
    """Returns everything that is kept to the system. Tensors in use are not touched."""
    _C.release_cached()


def use_huge_pages(*owners: Tensor | nn.Module) -> int:
    """Moves the memory of tensors to pages of 2 MiB. Their values and addresses stay.

    For weights that something reads over and over: a bank in a compiled model, buffers of
    ``main_grads``, any large layer. It takes 0.2 to 1.2 seconds a GiB.

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
    return sum(_C.use_huge_pages(address, size) for address, size in sizes.items())


def move_to_huge_pages(module: nn.Module, *weights: Tensor) -> None:
    """use_huge_pages by itself: once for each memory that the weights of a module have had."""
    large = any(w.nbytes >= _HUGE_FROM for w in weights)
    if not (_by_themselves and large and all(is_plain(w) for w in weights)):
        return
    try:
        addresses = tuple(w.data_ptr() for w in weights)
    except RuntimeError:  # Wrapped by a transformation of torch.func.
        return
    if _seen.get(module) != addresses:
        _seen[module] = addresses
        use_huge_pages(*(w for w in weights if not w.is_shared()))


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

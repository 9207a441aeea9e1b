"""Memory that large CPU outputs leave behind for the next call.

When a large output of an op is freed (8 MiB and more: weight gradients, above all), its memory is
kept for the next one, because fresh memory has to be zeroed by the system first, which takes as
long as a third of a layer's backward. The system may take the kept pages back whenever it needs
them. ``MOE_OPS_CACHE_MB`` in the environment sets how much is kept at most (0: nothing); otherwise
it is a quarter of the machine's memory. With torch 2.10, which lacks what this needs, nothing is.
"""

from __future__ import annotations

from moe_ops import _C


def cached_bytes() -> int:
    """Bytes that are kept and that no tensor uses."""
    return _C.cached_bytes()


def cache_limit() -> int:
    """The most bytes that are kept."""
    return _C.cache_limit()


def release_cached() -> None:
    """Returns everything that is kept to the system. Tensors in use are not touched."""
    _C.release_cached()
